"""Pages as a browser shows them: headless Chromium, where it is installed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.processes import HANGING

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian's package chromium)")

FRAME = """<!DOCTYPE html><meta charset="utf-8"><body><iframe src="driven.html" width="{width}" height="900"></iframe>
<script>
addEventListener("message", ({{ data }}) => {{ document.body.innerHTML = "<pre>" + data + "</pre>"; }});
</script>"""

DRIVER = """<script>
addEventListener("load", () => {{
  const told = (() => {{ {code} }})();
  parent.postMessage(JSON.stringify(told).replace(/</g, "&lt;"), "*");
}});
</script></body>"""


def driven(page: Path, code: str, folder: Path, *, width: int = 1000, dark: bool = False) -> tuple[str, list[str]]:
    """What JavaScript returns in a page, as JSON, and what the page wrote to the console.

    Args:
        page: the file.
        code: the body of a function, run when the page is loaded.
        folder: for copies and the browser's profile.
        width: of the window in which the page is shown, pixels.
        dark: whether the reader prefers dark colours.
    """
    folder.mkdir(exist_ok=True)
    html = page.read_text(encoding="utf-8").replace("</body>", DRIVER.format(code=code))
    (folder / "driven.html").write_text(html, encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.format(width=width), encoding="utf-8")
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
            "--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom",
            *(["--blink-settings=preferredColorScheme=0"] if dark else []), (folder / "frame.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=HANGING, check=True,
    )  # fmt: skip
    found = re.search(r"<pre>(.*)</pre>", done.stdout, re.DOTALL)
    assert found, f"the page did not load: {done.stdout[:500]}"
    told = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return told, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
