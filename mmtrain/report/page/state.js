// What the reader has chosen, and who is told of a change.

const state = { axis: "step", zoom: null, hover: null, smooth: true, hidden: new Set() };
const charts = [];
let asked = false;

/** Draw every chart that is on the screen, once, at the next frame. */
function redraw() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    for (const chart of charts) chart.fresh = false;
    for (const chart of charts) if (chart.seen) chart.draw();
  });
}

const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const chart = charts.find((one) => one.canvas === entry.target);
    chart.seen = entry.isIntersecting;
    if (chart.seen && !chart.fresh) chart.draw();
  }
}, { rootMargin: "200px" });

/** Let a chart be drawn whenever it can be seen and something has changed. */
function register(chart) {
  charts.push(chart);
  watcher.observe(chart.canvas);
}

const isShown = (run) => !state.hidden.has(DATA.runs.indexOf(run));
const shownRuns = () => DATA.runs.filter(isShown);

let colours = null;

/** Colours of the theme at work, read from the style once. */
function theme() {
  if (colours) return colours;
  const style = getComputedStyle(document.documentElement);
  const read = (name) => style.getPropertyValue(`--${name}`).trim();
  const names = ["ink", "soft", "grid", "card", "band", "bad", "care", "low", "mid", "high"];
  colours = Object.fromEntries(names.map((name) => [name, read(name)]));
  colours.runs = Array.from({ length: 8 }, (_, i) => read(`run-${i}`));
  return colours;
}

const colourOf = (index) => theme().runs[index % 8];
const dashOf = (index) => (index < 8 ? [] : [7, 3]);

/** Take the colours anew: the theme has changed. */
function rethemed() {
  colours = null;
  redraw();
}

function toggleTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  rethemed();
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", rethemed);
addEventListener("resize", redraw);
