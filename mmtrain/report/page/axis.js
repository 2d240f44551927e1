// Ticks and scales of an axis.

/** Round values inside [low, high], about `wanted` of them. */
function linearTicks(low, high, wanted) {
  const rough = (high - low) / Math.max(1, wanted);
  if (!(rough > 0)) return [low];
  const size = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((times) => times * size).find((one) => one >= rough * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

/** Round hours: minutes and days have sixes and twelves. */
function hourTicks(low, high, wanted) {
  const rough = (high - low) / Math.max(1, wanted);
  const steps = [1, 5, 10, 30, 60, 300, 600, 1800, 3600, 7200, 21600, 43200, 86400, 172800, 432800].map((s) => s / 3600);
  const step = steps.find((one) => one >= rough);
  if (!step) return linearTicks(low / 24, high / 24, wanted).map((days) => days * 24);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high * (1 + 1e-9); i++) ticks.push(i * step);
  return ticks;
}

/** Powers of ten, or 1, 2 and 5 of each where there are few; plain ticks within less than a factor of eight. */
function logTicks(low, high, wanted) {
  if (high / low < 8) return linearTicks(low, high, wanted);
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  const each = last - first <= 3 ? [1, 2, 5] : [1];
  const every = Math.max(1, Math.ceil(Math.log10(high / low) / Math.max(1, wanted)));
  const ticks = [];
  for (let power = first; power <= last; power += every) {
    for (const times of each) {
      const tick = Number((times * 10 ** power).toPrecision(6));
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
    }
  }
  return ticks;
}

/** A scale from values to pixels, and back. */
function scaleOf(low, high, from, to, log) {
  const turn = log ? Math.log : (value) => value, back = log ? Math.exp : (value) => value;
  const a = turn(low), b = turn(high), span = b - a || 1;
  const at = (value) => from + ((turn(value) - a) / span) * (to - from);
  at.back = (pixel) => back(a + ((pixel - from) / (to - from)) * span);
  return at;
}

/** A range with room around it: of one value too. */
function withRoom(low, high, log, share) {
  if (log) {
    const room = Math.max((high / low) ** share, 1.02);
    return [low / room, high * room];
  }
  const room = (high - low) * share || Math.abs(high) * 0.1 || 1;
  return [low - room, high + room];
}

/** Make a canvas as sharp as the screen, and return its context in CSS pixels, cleared, with its size. */
function prepareCanvas(canvas) {
  const width = canvas.clientWidth, height = canvas.clientHeight, ratio = devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.font = "11px system-ui, sans-serif";
  return { pen, width, height };
}
