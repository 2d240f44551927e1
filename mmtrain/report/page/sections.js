// The top of the page, and the curves.

/** A figure of each step. Names are those of metrics.jsonl; `also` are dashed or dotted beside it. */
const CURVES = [
  { title: "Loss", figure: "loss", note: "nats a token", points: ["val_loss"], names: ["training", "held-out"], format: lossText, wide: true, smooth: true },
  { title: "Held-out bits per byte", points: ["val_bits_per_byte"], format: lossText, note: "does not depend on the tokenizer" },
  { title: "Gradient norm", figure: "grad_norm", note: "before clipping", log: true },
  { title: "Learning rate", figure: "lr", plain: true, zero: true, tick: figureText },
  { title: "Batch", figure: "batch_tokens", note: "tokens a step, padding too", plain: true, stairs: true, zero: true, format: countText, tick: countText },
  { title: "Throughput", figure: "tokens_per_s", note: "tokens of text a second", zero: true, format: countText, tick: countText },
  { title: "MFU", figure: "mfu", note: "of the devices' peak", zero: true, format: percentText, tick: percentText },
  { title: "Step time", figure: "step_s", log: true, format: secondsText, tick: secondsText },
  { title: "Device memory", figure: "memory_gib", also: ["memory_predicted_gib"], names: ["measured peak", "predicted"], plain: true, zero: true, format: gibText, tick: gibText },
  { title: "Assignments dropped", figure: "drop_rate", also: ["drop_rate_alone"], names: ["with the batch's capacity", "each micro-batch alone"], note: "mean over layers", zero: true, format: percentText, tick: percentText },
  { title: "Balancing loss", figure: "aux_loss", note: "0.01 a layer is perfect balance" },
  { title: "Router entropy", points: ["router_entropy"], note: "nats, mean over layers" },
  { title: "Busiest expert rank", points: ["rank_load"], note: "over the ranks' mean, worst layer", keep: [1] },
  { title: "Balance of shared rows", figure: "cp_balance", note: "softmax work of the busiest rank over the mean", keep: [1] },
  { title: "Devices' pace", points: ["pace_product_s/most", "pace_product_s/median", "pace_product_s/least"], names: ["slowest rank", "median", "fastest"], note: "seconds of one product on each rank", zero: true, format: secondsText, tick: secondsText },
  { title: "Waiting for rows", points: ["pace_rows_s/most", "pace_rows_s/median"], names: ["slowest rank", "median"], note: "seconds a step", zero: true, format: secondsText, tick: secondsText },
  { title: "Experts' communication", figure: "exchange_s", note: "seconds a step", zero: true, format: secondsText, tick: secondsText },
  { title: "Communication hidden", figure: "exchange_hidden", note: "share that computing covered", zero: true, format: percentText, tick: percentText },
  { title: "Tokens a row", figure: "seq_len", log: true, plain: true, stairs: true, format: lengthText, tick: lengthText, changes: true },
  { title: "RoPE base", figure: "rope_base", log: true, plain: true, stairs: true, format: countText, tick: countText, changes: true },
  { title: "Needles found", points: ["needles", "needles/single", "needles/multi", "needles/multi_key", "needles/variable_tracking"], names: ["all kinds", "single", "multi", "multi_key", "variable_tracking"], note: "% of samples", keep: [0, 100] },
];
const DASHES = [null, [5, 3], [2, 3], [8, 3, 2, 3], [1, 4]];

function seriesOf(curve) {
  const made = [];
  const add = (run, name, levels, label, order, marks) => levels.length && made.push({ run, name, levels, label, marks, dash: order ? DASHES[order] : null, plain: curve.plain || marks, stairs: curve.stairs });
  for (const run of DATA.runs) {
    const names = curve.names || [];
    const each = [...(curve.figure ? [[curve.figure, curveOf]] : []), ...(curve.also || []).map((name) => [name, curveOf]), ...(curve.points || []).map((name) => [name, pointsOf])];
    each.forEach(([name, read], order) => add(run, name, read(run, name), names[order], order, read === pointsOf && read(run, name).length && read(run, name)[0].mean.length < 60));
  }
  return made;
}

function varies(series) {
  return series.some((one) => one.levels[0].mean.some((value) => value !== series[0].levels[0].mean[0]));
}

function curveCard(curve) {
  const series = seriesOf(curve);
  if (!series.length || (curve.changes && !varies(series))) return null;
  const canvas = el("canvas", { tabindex: "0", role: "img", "aria-label": `${curve.title}: ${series.map((one) => `${one.run.name} ends at ${(curve.format || figureText)(lastOf(one))}`).slice(0, 4).join(", ")}. Arrow keys read values, + and - zoom.` });
  const readout = el("div", { class: "readout", hidden: true });
  const chart = new Chart(canvas, { series, ownValues: curve.changes, log: Boolean(curve.log), zero: curve.zero, keep: curve.keep, format: curve.format || figureText, tick: curve.tick || figureText });
  listen(chart, readout);
  const labels = [...new Map(series.filter((one) => one.label).map((one) => [one.label, one])).values()];
  const legend = labels.length > 1 || (labels[0] && labels[0].dash) ? el("div", { class: "legend" }, labels.map((one) => el("span", {}, strokeSample(one), one.label))) : null;
  const last = DATA.runs.length === 1 ? el("b", { class: "last", title: "last value", text: chart.format(lastOf(series[0])) }) : null;
  const log = toggle("log", chart.log, (on) => { chart.log = on; redraw(); }, "Logarithmic scale of values");
  const made = card(curve.title, curve.note, [last, log], legend, el("div", { class: "plot" }, canvas, readout));
  if (curve.wide) made.classList.add("wide");
  return made;
}

function strokeSample(one) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  for (const [name, value] of [["width", 26], ["height", 8], ["aria-hidden", "true"]]) svg.setAttribute(name, value);
  for (const [name, value] of [["d", "M1 4H25"], ["stroke", "currentColor"], ["stroke-width", 2], ["stroke-dasharray", (one.dash || []).join(" ")]]) path.setAttribute(name, value);
  svg.append(path);
  return svg;
}

/** The last value of a series: the step's own, not its bucket's. */
function lastOf(one) {
  return one.name in one.run.curves.last ? one.run.curves.last[one.name] : lastKnown(one.levels[0].mean);
}

function lastKnown(values) {
  for (let i = values.length - 1; i >= 0; i--) if (Number.isFinite(values[i])) return values[i];
  return NaN;
}

function curvesSection() {
  const cards = CURVES.map(curveCard).filter(Boolean);
  const kinds = new Set(DATA.runs.flatMap((run) => run.marks.map((mark) => mark.kind)));
  const glyphs = { skipped: "× skipped step", rollback: "◂ rollback", restart: "▴ restart", layout: "■ new layout" };
  const legend = [...kinds].map((kind) => el("span", { class: `glyph ${kind}`, text: glyphs[kind] }));
  const help = el("p", { class: "help" }, "Drag across a chart to zoom all of them, double-click to see everything again. ", legend);
  return section("curves", "Curves", help, el("div", { class: "grid" }, cards));
}
