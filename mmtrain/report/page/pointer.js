// Pointer and keys on a chart: read-out, zoom by dragging, and the same without a mouse.

function listen(chart, readout) {
  const canvas = chart.canvas;
  let from = null;
  const inside = (event) => event.clientX - canvas.getBoundingClientRect().left;
  const place = (pixel) => chart.x.back(Math.min(Math.max(pixel, chart.box.left), chart.box.right));
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    from = inside(event);
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!chart.x) return;
    const at = inside(event);
    if (from !== null && Math.abs(at - from) > 4) {
      const ends = [from, at].map((pixel) => Math.min(Math.max(pixel, chart.box.left), chart.box.right));
      chart.dragged = [Math.min(...ends), Math.max(...ends)];
    }
    hoverAt(chart, readout, place(at));
  });
  canvas.addEventListener("pointerup", () => {
    const dragged = chart.dragged;
    from = chart.dragged = null;
    if (dragged && dragged[1] - dragged[0] > 6) zoomTo(dragged.map(place));
    redraw();
  });
  const leave = () => { from = chart.dragged = null; hoverAt(chart, readout, null); };
  canvas.addEventListener("pointercancel", leave);
  canvas.addEventListener("pointerleave", () => { if (from === null) leave(); });
  canvas.addEventListener("dblclick", () => zoomTo(null));
  canvas.addEventListener("blur", leave);
  canvas.addEventListener("keydown", (event) => {
    if (onKey(chart, readout, event.key)) event.preventDefault();
  });
}

/** Arrows move the cursor, + and - zoom around it, 0 and Escape show all; returns whether the key meant something. */
function onKey(chart, readout, key) {
  if (!chart.x) return false;
  const [low, high] = chart.xRange(), middle = state.hover === null ? (low + high) / 2 : state.hover;
  const move = { ArrowLeft: -1, ArrowRight: 1 }[key];
  if (move) hoverAt(chart, readout, Math.min(high, Math.max(low, middle + (move * (high - low)) / 100)));
  else if (key === "+" || key === "=") zoomTo([middle - (middle - low) / 2, middle + (high - middle) / 2]);
  else if (key === "-") zoomTo(widened(chart, low, high));
  else if (key === "0" || key === "Escape") zoomTo(null);
  else return false;
  return true;
}

function widened(chart, low, high) {
  const now = state.zoom;
  state.zoom = null;
  const [least, most] = chart.xRange();
  state.zoom = now;
  const wide = [Math.max(least, low - (high - low) / 2), Math.min(most, high + (high - low) / 2)];
  return wide[0] <= least && wide[1] >= most ? null : wide;
}

function zoomTo(range) {
  state.zoom = range && range[1] > range[0] ? range : null;
  showRange();
  redraw();
}

/** Show what all curves of a chart are at a place; null hides it. */
function hoverAt(chart, readout, place) {
  state.hover = place;
  redraw();
  const found = place === null ? [] : chart.valuesAt(place);
  readout.hidden = !found.length;
  if (!found.length) return;
  const axis = AXES[state.axis], first = found[0];
  const step = first.size > 1 ? `steps ${exactText(Math.max(1, first.step - first.size + 1))} – ${exactText(first.step)}` : `step ${exactText(first.step)}`;
  const where = state.axis === "step" ? step : `${axis.text(first.at)} · ${step}`;
  readout.replaceChildren(el("div", { class: "where", text: where }), ...found.map((one) => valueLine(chart, one)), ...markLines(chart, place));
  const left = chart.x(place), half = readout.offsetWidth;
  const room = chart.canvas.clientWidth - half - 4;
  readout.style.left = `${Math.max(4, Math.min(left + 14 > room ? left - half - 14 : left + 14, room))}px`;
}

function valueLine(chart, found) {
  const label = [DATA.runs.length > 1 ? found.one.run.name : null, found.one.label].filter(Boolean).join(" · ");
  const wide = found.low !== null && found.low < found.high;
  return el("div", { class: "value" }, swatch(DATA.runs.indexOf(found.one.run)), el("span", { class: "label", text: label }),
    el("b", { text: chart.format(found.value) }),
    wide ? el("small", { text: ` ${chart.format(found.low)} – ${chart.format(found.high)}` }) : null);
}

/** Marks within a few pixels of a place. */
function markLines(chart, place) {
  const axis = ["step", "tokens", "hours"].indexOf(state.axis);
  const marks = shownRuns().flatMap((run) => run.marks).filter((mark) => Math.abs(chart.x(mark.at[axis]) - chart.x(place)) < 4);
  return marks.slice(0, 3).map((mark) => el("div", { class: "mark", text: `${mark.kind}${mark.text === mark.kind ? "" : `: ${mark.text}`} at step ${exactText(mark.at[0])}` }));
}
