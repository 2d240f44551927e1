// The first screen: what ran, on what, how far, what came of it, and what went wrong first.

const FIGURES = [
  ["Step", (run) => exactText(run.summary.step), (run) => planText(run.summary)],
  ["Tokens", (run) => countText(run.summary.tokens)],
  ["Training loss", (run) => lossText(run.summary.loss), (run) => `last step; first ${lossText(run.summary.first_loss)}`],
  ["Held-out loss", (run) => lossText(run.summary.val_loss), (run) => (run.summary.val_step ? `at step ${exactText(run.summary.val_step)}` : "no validation")],
  ["Bits per byte", (run) => lossText(run.summary.val_bits_per_byte), () => "held-out"],
  ["Needles", (run) => (known(run.summary.needles) ? `${figureText(run.summary.needles)}%` : NONE), () => "last evaluation"],
  ["Tokens a second", (run) => countText(run.summary.tokens_per_s), (run) => `median; ${secondsText(run.summary.step_s)} a step`],
  ["MFU", (run) => percentText(run.summary.mfu), () => "median"],
  ["Memory", (run) => gibText(run.summary.memory_gib), (run) => (known(run.summary.memory_predicted_gib) ? `${gibText(run.summary.memory_predicted_gib)} predicted` : "peak of a device")],
  ["Dropped", (run) => percentText(run.summary.drop_rate), () => "of assignments, median"],
  ["Time", (run) => hoursText(run.summary.hours), (run) => `${hoursText(run.summary.training_hours)} in steps`],
];

function planText(summary) {
  return known(summary.last_step) && summary.last_step >= summary.step ? `of ${exactText(summary.last_step)} planned` : "the last on record";
}

function runLine(run) {
  const about = run.about, summary = run.summary;
  const parts = known(summary.parameters) ? `${countText(summary.parameters)} parameters, ${countText(summary.activated)} activated` : null;
  const where = about.processes ? `${exactText(about.processes)} ${about.processes === 1 ? "process" : "processes"} on ${about.device}` : about.device;
  return [summary.model, parts, summary.stage && `stage ${summary.stage}`, where, about.layout].filter(Boolean).join(" · ");
}

function troublesOf(run) {
  const heading = DATA.runs.length > 1 ? el("p", { class: "whose" }, runName(run), el("span", { class: "about", text: runLine(run) })) : null;
  if (!run.troubles.length) return el("div", { class: "troubles" }, heading, el("p", { class: "calm", text: "Nothing went wrong on record: no skipped step, rollback, restart, slow rank or damaged file." }));
  const words = { bad: "Problem", care: "Look at", note: "Note" };
  return el("div", { class: "troubles" }, heading,
    el("ul", {}, run.troubles.map((one) => el("li", { class: one.level }, el("b", { text: words[one.level] }), el("span", { text: one.text })))));
}

function summarySection() {
  const runs = DATA.runs;
  if (runs.length === 1) {
    const [run] = runs;
    const cells = FIGURES.map(([name, value, note]) => [name, value(run), note && note(run)]).filter(([, text]) => !text.startsWith(NONE));
    return section("summary", "Summary", el("p", { class: "about", text: runLine(run) }), troublesOf(run),
      el("dl", { class: "figures" }, cells.map(([name, text, note]) => el("div", {}, el("dt", { text: name }), el("dd", {}, el("b", { text }), note ? el("small", { text: note }) : null)))));
  }
  const shown = FIGURES.filter(([, value]) => runs.some((run) => !value(run).startsWith(NONE)));
  const columns = ["Run", ...shown.map(([name]) => `#${name}`)];
  const rows = runs.map((run) => [runName(run), ...shown.map(([, value]) => value(run))]);
  return section("summary", "Summary", runs.map(troublesOf), tableOf(columns, rows, { label: "Figures of all runs" }));
}

/** Buttons that show and hide runs; nothing where there is one. */
function runChips() {
  if (DATA.runs.length < 2) return null;
  return el("div", { class: "chips", role: "group", "aria-label": "Runs" }, DATA.runs.map((run, i) => {
    const chip = toggle("", true, (on) => { state.hidden[on ? "delete" : "add"](i); redraw(); }, "Show or hide this run");
    chip.classList.add("chip");
    chip.replaceChildren(swatch(i), el("span", { text: run.name }));
    return chip;
  }));
}

const rangeButton = el("button", { type: "button", class: "range", hidden: true, on: { click: () => zoomTo(null) } });

function showRange() {
  rangeButton.hidden = !state.zoom;
  if (state.zoom) rangeButton.textContent = `${AXES[state.axis].text(state.zoom[0])} – ${AXES[state.axis].text(state.zoom[1])}  ✕`;
}

function toolbar() {
  const axes = choice("Horizontal axis", Object.entries(AXES).map(([name, axis]) => [name, axis.name]), state.axis, (axis) => {
    state.axis = axis;
    state.hover = null;
    zoomTo(null);
  });
  const smooth = toggle("Smooth", state.smooth, (on) => { state.smooth = on; redraw(); }, "Running median over 2% of the points");
  return el("div", { class: "toolbar" }, axes, smooth, rangeButton, runChips());
}
