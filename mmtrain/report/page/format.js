// Numbers and times as a reader wants them.

const NONE = "–";
const known = (value) => typeof value === "number" && Number.isFinite(value);

/** Write 1234567 as 1.23M; up to 9,999 in full. */
function countText(value) {
  if (!known(value)) return NONE;
  const size = Math.abs(value);
  if (size < 10000) return exactText(value);
  for (const [unit, suffix] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]]) {
    if (size >= unit) return Number((value / unit).toPrecision(size >= 999.5 * unit ? 4 : 3)) + suffix;
  }
  return exactText(value);
}

function exactText(value) {
  return known(value) ? value.toLocaleString("en-US", { maximumFractionDigits: Math.abs(value) < 100 ? 2 : 0 }) : NONE;
}

/** Four figures, without needless zeros or long exponents. */
function figureText(value) {
  if (!known(value)) return NONE;
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 10000) return countText(value);
  return size < 1e-3 ? Number(value.toPrecision(3)).toExponential() : String(Number(value.toPrecision(4)));
}

const lossText = (value) => (known(value) ? value.toFixed(4) : NONE);
const percentText = (value) => (known(value) ? `${Number((100 * value).toPrecision(3))}%` : NONE);
const gibText = (value) => (known(value) ? `${Number(value.toPrecision(3))} GiB` : NONE);

function secondsText(value) {
  if (!known(value)) return NONE;
  if (value < 1) return `${Number((1000 * value).toPrecision(3))} ms`;
  return value < 120 ? `${Number(value.toPrecision(3))} s` : hoursText(value / 3600);
}

function hoursText(hours) {
  if (!known(hours)) return NONE;
  const minutes = Math.round(hours * 60);
  if (hours < 1 / 60) return `${Math.round(hours * 3600)} s`;
  if (hours < 1) return `${(hours * 60).toFixed(hours < 0.2 ? 1 : 0)} min`;
  if (hours < 48) return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
  return `${Math.floor(minutes / 1440)} d ${String(Math.floor((minutes % 1440) / 60)).padStart(2, "0")} h`;
}

function bytesText(bytes) {
  if (!known(bytes)) return NONE;
  for (const [unit, suffix] of [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (bytes >= unit) return `${Number((bytes / unit).toPrecision(3))} ${suffix}`;
  }
  return `${bytes} B`;
}

/** Lengths of rows: 131072 as 128Ki, as options have them. */
function lengthText(length) {
  for (const [unit, suffix] of [[2 ** 20, "Mi"], [2 ** 10, "Ki"]]) {
    if (length >= unit && length % unit === 0) return `${length / unit}${suffix}`;
  }
  return exactText(length);
}

const timeText = (time) => (time ? `${String(time).slice(0, 16).replace("T", " ")} UTC` : NONE);

const AXES = {
  step: { name: "Steps", unit: "steps", text: (x) => exactText(Math.round(x)), tick: countText },
  tokens: { name: "Tokens", unit: "tokens", text: countText, tick: countText },
  hours: { name: "Time", unit: "time since the first step", text: hoursText, tick: hoursText },
};
