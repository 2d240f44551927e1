// A chart of curves over steps, tokens or time.
//
// series: {run, label, levels, dash, marks, stairs, plain}: `marks` draws points, `stairs` steps, `plain` smooths nothing.

const ROOM = { top: 16, right: 10, bottom: 34 };

class Chart {
  constructor(canvas, options) {
    Object.assign(this, { canvas, log: false, format: figureText, tick: figureText, ...options });
    this.seen = this.fresh = false;
    register(this);
  }

  shown() {
    return this.series.filter((one) => isShown(one.run) && one.levels.length);
  }

  /** The level to draw: the fine one when the window holds few buckets of the coarse one. */
  levelOf(one) {
    const [coarse, fine] = one.levels;
    if (!fine || !state.zoom) return coarse;
    const [from, to] = this.span(coarse);
    return to - from < 400 ? fine : coarse;
  }

  /** Indices [from, to) of a level's points in the window, with one more on each side. */
  span(level) {
    const x = level.places[state.axis];
    if (!state.zoom) return [0, x.length];
    return [Math.max(0, lowerBound(x, state.zoom[0]) - 1), Math.min(x.length, lowerBound(x, state.zoom[1]) + 2)];
  }

  xRange() {
    if (state.zoom) return state.zoom;
    let low = Infinity, high = -Infinity;
    for (const run of shownRuns()) {
      const level = run.curves.levels[0], x = (level.places = level.places || unpackPlaces(level))[state.axis];
      low = Math.min(low, x[0]);
      high = Math.max(high, x[x.length - 1]);
    }
    return low < high ? [low, high] : [low - 0.5, low + 0.5];
  }

  /** Range of the values in the window; a few spikes may leave it. */
  yRange() {
    const values = [], edges = [];
    for (const one of this.shown()) {
      const level = this.levelOf(one), [from, to] = this.span(level);
      for (let i = from; i < to; i++) {
        for (const [part, into] of [[level.mean, values], [level.low, edges], [level.high, edges]]) {
          if (part && Number.isFinite(part[i]) && (!this.log || part[i] > 0)) into.push(part[i]);
        }
      }
    }
    if (!values.length) return [this.log ? 0.1 : 0, 1];
    const all = values.concat(edges).sort((a, b) => a - b), last = all.length - 1;
    const cut = this.log || last < 200 ? 0 : 0.004;
    let low = all[Math.floor(cut * last)], high = all[Math.ceil((1 - cut) * last)];
    for (const value of this.keep || []) { low = Math.min(low, value); high = Math.max(high, value); }
    if (this.zero && !this.log) low = Math.min(0, low);
    const [wide, tall] = withRoom(low, high, this.log, 0.06);
    return [this.zero && !this.log ? 0 : wide, tall];
  }

  /** Round values, or the few that the curves have and no other. */
  yTicks(low, high, wanted) {
    if (this.ownValues) {
      const own = [...new Set(this.shown().flatMap((one) => [...one.levels[0].mean]))].filter((value) => value >= low && value <= high);
      if (own.length <= 7) return own.sort((a, b) => a - b);
    }
    return (this.log ? logTicks : linearTicks)(low, high, wanted);
  }

  draw() {
    this.fresh = true;
    const { pen, width, height } = prepareCanvas(this.canvas);
    const colour = theme(), [left, right] = this.xRange(), [low, high] = this.yRange();
    const yTicks = this.yTicks(low, high, Math.max(2, Math.floor(height / 48)));
    const labels = yTicks.map((value) => this.tick(value));
    const margin = 10 + Math.max(16, ...labels.map((text) => pen.measureText(text).width));
    this.box = { left: margin, right: width - ROOM.right, top: ROOM.top, bottom: height - ROOM.bottom };
    this.x = scaleOf(left, right, this.box.left, this.box.right, false);
    this.y = scaleOf(low, high, this.box.bottom, this.box.top, this.log);
    this.drawPhases(pen, colour);
    this.drawGrid(pen, colour, yTicks, labels);
    pen.save();
    pen.beginPath();
    pen.rect(this.box.left, this.box.top - 4, this.box.right - this.box.left, this.box.bottom - this.box.top + 5);
    pen.clip();
    for (const one of this.shown()) this.drawSeries(pen, one);
    pen.restore();
    this.drawMarks(pen, colour);
    this.drawCursor(pen, colour);
  }

  drawGrid(pen, colour, yTicks, labels) {
    const { left, right, top, bottom } = this.box, axis = AXES[state.axis];
    pen.lineWidth = 1;
    pen.strokeStyle = colour.grid;
    pen.fillStyle = colour.soft;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    yTicks.forEach((value, i) => {
      const y = Math.round(this.y(value)) + 0.5;
      line(pen, left, y, right, y);
      pen.fillText(labels[i], left - 6, y);
    });
    const [from, to] = this.xRange(), wanted = Math.floor((right - left) / 68);
    const ticks = (state.axis === "hours" ? hourTicks : linearTicks)(from, to, wanted);
    pen.textBaseline = "top";
    let free = -Infinity;
    for (const value of ticks) {
      const x = this.x(value), text = axis.tick(value), half = pen.measureText(text).width / 2;
      line(pen, Math.round(x) + 0.5, bottom, Math.round(x) + 0.5, bottom + 4);
      const centre = Math.min(Math.max(x, half + 1), right + ROOM.right - half - 1);
      if (centre - half < free + 8) continue;
      pen.textAlign = "center";
      pen.fillText(text, centre, bottom + 6);
      free = centre + half;
    }
    pen.textAlign = "right";
    pen.fillText(axis.unit, right, bottom + 20);
    pen.strokeStyle = colour.soft;
    line(pen, left, bottom + 0.5, right, bottom + 0.5);
  }

  /** Shade every second phase and name each, where one run is shown and has several. */
  drawPhases(pen, colour) {
    const runs = shownRuns();
    if (runs.length !== 1 || runs[0].phases.length < 2) return;
    const { left, right, top, bottom } = this.box;
    for (const [index, edge] of phaseEdges(runs[0]).entries()) {
      const from = Math.max(left, this.x(edge.from)), to = Math.min(right, this.x(edge.to));
      if (to <= from) continue;
      if (index % 2) {
        pen.fillStyle = colour.band;
        pen.fillRect(from, top, to - from, bottom - top);
      }
      pen.fillStyle = colour.soft;
      pen.textAlign = "left";
      pen.textBaseline = "alphabetic";
      const text = fitted(pen, edge.name, to - from - 6);
      if (text) pen.fillText(text, from + 3, top - 4);
    }
  }

  drawSeries(pen, one) {
    const index = DATA.runs.indexOf(one.run), level = this.levelOf(one), [from, to] = this.span(level);
    const x = level.places[state.axis], smooth = state.smooth && !one.plain && level.mean.length > 30;
    pen.strokeStyle = pen.fillStyle = colourOf(index);
    pen.lineJoin = "round";
    if (level.low) this.fillBand(pen, x, level, from, to);
    if (smooth && !level.low) this.strokeLine(pen, x, level.mean, from, to, 1, 0.3, one);
    const dash = one.dash || dashOf(index);
    pen.setLineDash(dash);
    this.strokeLine(pen, x, smooth ? smoothed(level) : level.mean, from, to, 1.7, 1, one);
    pen.setLineDash([]);
    if (one.marks || to - from < 2) {
      for (let i = from; i < to; i++) if (Number.isFinite(level.mean[i])) dot(pen, this.x(x[i]), this.y(level.mean[i]), 3);
    }
  }

  fillBand(pen, x, level, from, to) {
    pen.globalAlpha = 0.22;
    for (const [begin, end] of pieces(level.high, from, to)) {
      pen.beginPath();
      for (let i = begin; i < end; i++) pen.lineTo(this.x(x[i]), this.y(level.high[i]));
      for (let i = end - 1; i >= begin; i--) pen.lineTo(this.x(x[i]), this.y(this.log ? Math.max(level.low[i], 1e-30) : level.low[i]));
      pen.fill();
    }
    pen.globalAlpha = 1;
  }

  strokeLine(pen, x, values, from, to, width, alpha, one) {
    pen.lineWidth = width;
    pen.globalAlpha = alpha;
    pen.beginPath();
    let last = null;
    for (let i = from; i < to; i++) {
      if (!Number.isFinite(values[i]) || (this.log && values[i] <= 0)) { last = null; continue; }
      const px = this.x(x[i]), py = this.y(values[i]);
      if (last === null) pen.moveTo(px, py);
      else {
        if (one.stairs) pen.lineTo(px, last);
        pen.lineTo(px, py);
      }
      last = py;
    }
    pen.stroke();
    pen.globalAlpha = 1;
  }

  /** Ticks above the curves: skipped steps, restarts, rollbacks, new layouts. */
  drawMarks(pen, colour) {
    const { left, right, top, bottom } = this.box;
    for (const run of shownRuns()) {
      for (const mark of run.marks) {
        const x = this.x(mark.at[["step", "tokens", "hours"].indexOf(state.axis)]);
        if (x < left - 1 || x > right + 1) continue;
        pen.strokeStyle = pen.fillStyle = mark.kind === "skipped" || mark.kind === "rollback" ? colour.bad : DATA.runs.length > 1 ? colourOf(DATA.runs.indexOf(run)) : colour.soft;
        pen.globalAlpha = 0.55;
        pen.setLineDash([2, 3]);
        pen.lineWidth = 1;
        line(pen, x, top, x, bottom);
        pen.setLineDash([]);
        pen.globalAlpha = 1;
        drawGlyph(pen, mark.kind, x, bottom);
      }
    }
  }

  drawCursor(pen, colour) {
    if (this.dragged) {
      pen.fillStyle = colour.ink;
      pen.globalAlpha = 0.12;
      pen.fillRect(this.dragged[0], this.box.top, this.dragged[1] - this.dragged[0], this.box.bottom - this.box.top);
      pen.globalAlpha = 1;
    }
    if (state.hover === null) return;
    const x = this.x(state.hover);
    if (x < this.box.left - 1 || x > this.box.right + 1) return;
    pen.strokeStyle = colour.soft;
    pen.lineWidth = 1;
    line(pen, x, this.box.top, x, this.box.bottom);
    for (const found of this.valuesAt(state.hover)) {
      const y = this.y(found.value);
      if (y < this.box.top - 4 || y > this.box.bottom + 1 || !Number.isFinite(y)) continue;
      pen.fillStyle = colour.card;
      dot(pen, this.x(found.at), y, 4.5);
      pen.fillStyle = colourOf(DATA.runs.indexOf(found.one.run));
      dot(pen, this.x(found.at), y, 3);
    }
  }

  /** What each series is at a place: the nearest point; nothing before its first and after its last one. */
  valuesAt(place) {
    const found = [];
    for (const one of this.shown()) {
      const level = this.levelOf(one), x = level.places[state.axis];
      const near = x.length > 1 ? (1.5 * (x[x.length - 1] - x[0])) / (x.length - 1) : Infinity;
      if (place < x[0] - near || place > x[x.length - 1] + near) continue;
      let i = lowerBound(x, place);
      if (i >= x.length || (i > 0 && place - x[i - 1] < x[i] - place)) i--;
      if (Number.isFinite(level.mean[i])) {
        found.push({ one, at: x[i], value: level.mean[i], low: level.low && level.low[i], high: level.high && level.high[i],
          step: level.places.step[i], size: level.size });
      }
    }
    return found;
  }
}
