"use strict";
// The page has its curves without this script, which shows the values at the pointer or where the arrow keys move.
for (const figure of document.querySelectorAll(".chart")) {
  const svg = figure.querySelector("svg");
  const { series, left, right, low, high } = JSON.parse(figure.querySelector("script").textContent);
  const places = [...new Set(series.flatMap(({ points }) => points.map(([x]) => x)))].sort((a, b) => a - b);
  const cursor = svg.querySelector(".cursor");
  const reading = figure.querySelector(".reading");
  let place = -1;

  const format = (value) => (Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3)
    ? value.toExponential(2) : String(Number(value.toPrecision(4))));

  function show(index) {
    place = Math.max(0, Math.min(places.length - 1, index));
    const x = places[place];
    const across = left + (right - left) * (high > low ? (x - low) / (high - low) : 0.5);
    cursor.setAttribute("x1", across);
    cursor.setAttribute("x2", across);
    cursor.removeAttribute("visibility");
    const values = series.flatMap(({ name, points }) => {
      const found = points.find(([at]) => at === x);
      return found ? [`${name} ${format(found[1])}`] : [];
    });
    reading.textContent = `round ${x}: ${values.join(", ")}`;
  }

  function hide() {
    cursor.setAttribute("visibility", "hidden");
    reading.textContent = "";
    place = -1;
  }

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const across = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const x = low + ((across - left) / (right - left)) * (high - low);
    let nearest = 0;
    places.forEach((at, index) => { if (Math.abs(at - x) < Math.abs(places[nearest] - x)) nearest = index; });
    show(nearest);
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: places.length - 1 };
    if (event.key in steps) {
      show(steps[event.key]);
      event.preventDefault();
    }
  });
}
