// A sweep: losses over compute, each architecture a colour and a shape, with the fitted laws.

const PFLOPS_DAY = 86400e15;
const SHAPES = ["circle", "square", "triangle", "diamond", "cross", "ring"];

class Scatter {
  /** options: groups [{name, points}], x(point), y(point), laws [{group, at(x)}], xUnit, links */
  constructor(canvas, options) {
    Object.assign(this, { canvas, yLog: true, xLog: true }, options);
    this.seen = this.fresh = false;
    this.hiddenGroups = new Set();
    register(this);
  }

  known() {
    return this.groups.flatMap((group, order) => (this.hiddenGroups.has(order) ? [] : group.points.map((point) => ({ point, order, x: this.x(point), y: this.y(point) })))).filter((one) => known(one.x) && one.x > 0 && known(one.y) && one.y > 0);
  }

  draw() {
    this.fresh = true;
    const { pen, width, height } = prepareCanvas(this.canvas), colour = theme(), found = this.known();
    if (!found.length) return;
    const ends = (key) => [Math.min(...found.map((one) => one[key])), Math.max(...found.map((one) => one[key]))];
    const [left, right] = withRoom(...ends("x"), this.xLog, 0.05), [low, high] = withRoom(...ends("y"), this.yLog, 0.08);
    const yTicks = (this.yLog ? logTicks : linearTicks)(low, high, Math.max(3, Math.floor(height / 50)));
    const labels = yTicks.map(figureText), margin = 12 + Math.max(...labels.map((text) => pen.measureText(text).width), 14);
    this.box = { left: margin, right: width - 10, top: 8, bottom: height - 34 };
    this.atX = scaleOf(left, right, this.box.left, this.box.right, this.xLog);
    this.atY = scaleOf(low, high, this.box.bottom, this.box.top, this.yLog);
    this.drawAxes(pen, colour, yTicks, labels, left, right);
    for (const law of this.laws) if (!this.hiddenGroups.has(law.order)) this.drawLaw(pen, law, left, right, low, high);
    this.drawLinks(pen, found);
    for (const one of found) {
      pen.fillStyle = pen.strokeStyle = colourOf(one.order);
      pen.globalAlpha = one.point.final ? 1 : 0.35;
      shape(pen, SHAPES[one.order % SHAPES.length], this.atX(one.x), this.atY(one.y), one.point.final ? 4.5 : 2.5);
      pen.globalAlpha = 1;
    }
    if (this.at) {
      pen.strokeStyle = colour.ink;
      pen.lineWidth = 1.5;
      pen.beginPath();
      pen.arc(this.atX(this.at.x), this.atY(this.at.y), 8, 0, 7);
      pen.stroke();
    }
  }

  drawAxes(pen, colour, yTicks, labels, low, high) {
    const { left, right, top, bottom } = this.box;
    pen.strokeStyle = colour.grid;
    pen.fillStyle = colour.soft;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    pen.lineWidth = 1;
    yTicks.forEach((value, i) => {
      const y = Math.round(this.atY(value)) + 0.5;
      line(pen, left, y, right, y);
      pen.fillText(labels[i], left - 6, y);
    });
    pen.textAlign = "center";
    pen.textBaseline = "top";
    let free = -Infinity;
    for (const value of (this.xLog ? logTicks : linearTicks)(low, high, (right - left) / 80)) {
      const x = this.atX(value), text = value >= 1e15 ? value.toExponential(0).replace("e+", "e") : countText(value), half = pen.measureText(text).width / 2;
      line(pen, Math.round(x) + 0.5, top, Math.round(x) + 0.5, bottom);
      if (x - half < free + 8) continue;
      pen.fillText(text, Math.min(x, right - half), bottom + 6);
      free = x + half;
    }
    pen.textAlign = "right";
    pen.fillText(this.xUnit, right, bottom + 20);
  }

  drawLaw(pen, law, left, right, low, high) {
    pen.strokeStyle = colourOf(law.order);
    pen.lineWidth = 1.5;
    pen.setLineDash(DASHES[law.dash] || []);
    pen.beginPath();
    for (let i = 0; i <= 60; i++) {
      const x = Math.exp(Math.log(left) + (i / 60) * Math.log(right / left)), y = law.at(x);
      if (y < low || y > high) continue;
      pen.lineTo(this.atX(x), this.atY(y));
    }
    pen.stroke();
    pen.setLineDash([]);
  }

  /** Join the points of a run, or of one compute budget. */
  drawLinks(pen, found) {
    const lines = new Map();
    for (const one of found) {
      const key = this.link(one.point);
      if (key) lines.set(key, [...(lines.get(key) || []), one]);
    }
    pen.lineWidth = 1;
    pen.globalAlpha = 0.4;
    for (const points of lines.values()) {
      pen.strokeStyle = colourOf(points[0].order);
      pen.beginPath();
      for (const one of points.sort((a, b) => a.x - b.x)) pen.lineTo(this.atX(one.x), this.atY(one.y));
      pen.stroke();
    }
    pen.globalAlpha = 1;
  }
}

function shape(pen, name, x, y, r) {
  pen.beginPath();
  if (name === "square") pen.rect(x - r * 0.9, y - r * 0.9, r * 1.8, r * 1.8);
  else if (name === "triangle") { pen.moveTo(x, y - r * 1.2); pen.lineTo(x + r * 1.1, y + r * 0.8); pen.lineTo(x - r * 1.1, y + r * 0.8); pen.closePath(); }
  else if (name === "diamond") { pen.moveTo(x, y - r * 1.3); pen.lineTo(x + r * 1.1, y); pen.lineTo(x, y + r * 1.3); pen.lineTo(x - r * 1.1, y); pen.closePath(); }
  else if (name === "cross") { pen.lineWidth = 2; pen.moveTo(x - r, y - r); pen.lineTo(x + r, y + r); pen.moveTo(x + r, y - r); pen.lineTo(x - r, y + r); pen.stroke(); return; }
  else pen.arc(x, y, r, 0, 7);
  if (name === "ring") { pen.lineWidth = 2; pen.stroke(); } else pen.fill();
}

function pointText(point) {
  const parts = [point.architecture, point.experts ? `${point.experts} experts` : null, point.run, known(point.parameters) && `${countText(point.parameters)} parameters`, known(point.tokens) && `${countText(point.tokens)} tokens`,
    `${point.flops.toExponential(2).replace("e+", "e")} operations`, `loss ${lossText(point.loss)}`, point.final ? null : "on the way"];
  return parts.filter(Boolean).join(" · ");
}

function scatterCard(title, note, options) {
  const canvas = el("canvas", { tabindex: "0", role: "img", "aria-label": `${title}. Arrow keys read points.` });
  const hint = "Point at a run, or use the arrow keys, to read it.", told = el("p", { class: "told", "aria-live": "polite", text: hint });
  const chart = new Scatter(canvas, options);
  const show = (one) => { chart.at = one; told.textContent = one ? pointText(one.point) : hint; redraw(); };
  canvas.addEventListener("pointermove", (event) => {
    if (!chart.atX) return;
    const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    const near = chart.known().map((one) => [Math.hypot(chart.atX(one.x) - x, chart.atY(one.y) - y), one]).sort((a, b) => a[0] - b[0])[0];
    show(near && near[0] < 30 ? near[1] : null);
  });
  canvas.addEventListener("pointerleave", () => show(null));
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    const all = chart.known().sort((a, b) => a.x - b.x), now = chart.at ? all.findIndex((one) => one.point === chart.at.point) : -move;
    show(all[Math.min(all.length - 1, Math.max(0, now + move))]);
  });
  return card(title, note, [toggle("log loss", true, (on) => { chart.yLog = on; redraw(); }, "Logarithmic scale of losses")], el("div", { class: "plot" }, canvas), told);
}

function groupName(point) {
  return point.experts ? `${point.architecture || "points"}, ${point.experts} experts` : point.architecture || "points";
}

function sweepSection(sweep, order) {
  const names = [...new Set(sweep.points.map(groupName))];
  const groups = names.map((name) => ({ name, points: sweep.points.filter((point) => groupName(point) === name) }));
  const laws = sweep.laws.filter((law) => names.includes(law.label)).map((law) => ({ order: names.indexOf(law.label), dash: law.kind.includes("isoflop") ? 1 : 0, at: (flops) => law.beta * (flops / PFLOPS_DAY) ** law.alpha }));
  const legend = el("div", { class: "legend" }, names.map((name, i) => el("span", {}, shapeSample(i), name)), laws.length ? el("span", { class: "note", text: "lines: fitted loss over compute" }) : null);
  const cards = [scatterCard("Loss over compute", "operations of training", { groups, laws, x: (point) => point.flops, y: (point) => point.loss, xUnit: "operations", link: (point) => (sweep.points.length > 400 ? null : `${groupName(point)}/${point.run}`) })];
  const grouped = groups.map((group) => ({ ...group, points: group.points.filter((point) => point.group && known(point.parameters)) }));
  if (grouped.some((group) => group.points.length)) {
    cards.push(scatterCard("Loss over parameters", "a line for each compute budget", { groups: grouped, laws: [], x: (point) => point.parameters, y: (point) => (point.final ? point.loss : NaN), xUnit: "parameters", link: (point) => `${groupName(point)}/${point.group}` }));
  }
  const fit = sweep.fit.length ? el("details", {}, el("summary", { text: `Figures of the fit (${sweep.fit.length})` }), tableOf(["Figure", "Value"], sweep.fit, { label: "Fit", kind: "options" })) : el("p", { class: "help", text: "No fit.json here: points alone." });
  const lawTable = sweep.laws.length ? tableOf(["Architecture", "Law", "#Coefficient", "#Exponent"], sweep.laws.map((law) => [law.label, law.kind, figureText(law.beta), figureText(law.alpha)]), { label: "Laws" }) : null;
  const notes = sweep.notes.length ? el("details", { open: "" }, el("summary", { text: `What the data do not support (${sweep.notes.length})` }), tableOf(["Architecture", "", "Note"], sweep.notes, { label: "Doubts", kind: "options" })) : null;
  const damaged = sweep.damaged ? el("p", { class: "help", text: `${sweep.damaged} lines of points.jsonl are no points: left out.` }) : null;
  return section(order ? `sweep-${order}` : "sweep", `Sweep ${sweep.name}`, damaged, legend, el("div", { class: "grid two" }, cards), lawTable ? [el("h3", { text: "Loss by compute C in PFLOP/s-days: coefficient × C^exponent" }), lawTable] : null, notes, fit);
}

function shapeSample(order) {
  const canvas = el("canvas", { class: "sample", "aria-hidden": "true" });
  const one = { canvas, seen: false, fresh: false, draw() {
    this.fresh = true;
    const { pen } = prepareCanvas(canvas);
    pen.fillStyle = pen.strokeStyle = colourOf(order);
    shape(pen, SHAPES[order % SHAPES.length], 7, 7, 4.5);
  } };
  register(one);
  return canvas;
}
