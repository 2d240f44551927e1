// The data of the page: arrays are base64 of little-endian numbers.

const DATA = JSON.parse(document.getElementById("data").textContent);
const ARRAYS = { f4: Float32Array, f8: Float64Array, u2: Uint16Array };

/** Return the typed array that `{kind: base64}` holds; null for what is missing. */
function unpack(made) {
  if (!made) return null;
  const [kind, text] = Object.entries(made)[0];
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new ARRAYS[kind](bytes.buffer);
}

/** Places of points on each of the three axes. */
function unpackPlaces(made) {
  return { step: unpack(made.step), tokens: unpack(made.tokens), hours: unpack(made.hours) };
}

/** Levels of a run's curve, coarse first: places x, mean, and low and high where buckets hold several steps. */
function curveOf(run, name) {
  run.cache = run.cache || {};
  if (run.cache[name]) return run.cache[name];
  const levels = [];
  for (const level of run.curves.levels) {
    const figure = level.figures[name];
    if (!figure) continue;
    level.places = level.places || unpackPlaces(level);
    levels.push({
      places: level.places, size: level.size,
      mean: unpack(figure.mean), low: unpack(figure.low), high: unpack(figure.high),
    });
  }
  return (run.cache[name] = levels);
}

/** Figures that were measured now and then, as one level. */
function pointsOf(run, name) {
  const made = run.points[name];
  if (!made) return [];
  run.cache = run.cache || {};
  const key = `points/${name}`;
  return (run.cache[key] = run.cache[key] || [{ places: unpackPlaces(made), size: 1, mean: unpack(made.value), low: null, high: null }]);
}

/** Means of running medians over about 2% of a level's points: smooth, and one spike does not move them. */
function smoothed(level) {
  if (level.smooth) return level.smooth;
  const values = level.mean, half = Math.max(2, Math.floor(values.length / 100));
  const made = new Float32Array(values.length);
  for (let i = 0; i < values.length; i++) {
    const reach = Math.min(half, i, values.length - 1 - i), window = [];
    for (let j = i - reach; j <= i + reach; j++) if (Number.isFinite(values[j])) window.push(values[j]);
    window.sort((a, b) => a - b);
    made[i] = window.length ? window[window.length >> 1] : NaN;
  }
  return (level.smooth = meansAround(made, half));
}

/** Means over up to `half` values on each side that are known. */
function meansAround(values, half) {
  const made = new Float32Array(values.length);
  for (let i = 0; i < values.length; i++) {
    const reach = Math.min(half, i, values.length - 1 - i);
    let sum = 0, count = 0;
    for (let j = i - reach; j <= i + reach; j++) if (Number.isFinite(values[j])) { sum += values[j]; count++; }
    made[i] = count ? sum / count : NaN;
  }
  return made;
}
