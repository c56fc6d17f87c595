"""The documentation as a site: built strictly, with every page whole and nothing that a reader's browser must fetch."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import HANGING

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages, by their paths."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=HANGING,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in folder.rglob("*.html")}


def test_every_page_of_docs_is_in_the_navigation(site):
    pages = {str(path.relative_to(ROOT / "docs").with_suffix(".html")) for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= set(site)
    navigation = set(re.findall(r'href="([\w/-]+\.html)"', site["index.html"])) | {"index.html"}
    assert pages <= navigation


def test_nothing_is_fetched(site):
    for page, text in site.items():
        fetched = re.findall(r'<(?:script|link|img|iframe)\b[^>]*?(?:src|href)="([^"]+)"', text)
        assert fetched
        assert [address for address in fetched if "//" in address] == [], page


def test_equations_are_mathml(site):
    for page, least in (("method.html", 9), ("api/losses.html", 2), ("api/kernels.html", 5)):
        assert site[page].count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">') >= least, page
    for page, text in site.items():
        assert 'class="arithmatex"' not in text, page


def test_docstrings_leave_no_markup_of_another_kind(site):
    for page, text in site.items():
        prose = re.sub(r"<(pre|details)\b.*?</\1>", "", text, flags=re.DOTALL)
        assert not re.search(r":(func|class|meth|mod|attr|math):|\.\. math::", prose), page


def test_api_pages_show_what_is_public(site):
    for page, name in (
        ("api/dfad.html", "dfad.distillation.distiller.Distiller"),
        ("api/losses.html", "dfad.losses.InterpolatedKLDivLoss"),
        ("api/kernels.html", "dfad_kernels.interpolated_kl_div.interpolated_kl_div"),
        ("api/config.html", "dfad.config.MethodConfig"),
    ):
        assert f'id="{name}"' in site[page]
    assert 'href="#dfad_kernels.registration.FusedLoss"' in site["api/kernels.html"]
