// Heat maps of experts' loads and of needles.

const timesText = (value) => `${value.toFixed(2)}×`;

/** A canvas with a line below it that tells the chosen cell. */
function mapCard(title, note, controls, height, options) {
  const canvas = el("canvas", { tabindex: "0", role: "img", "aria-label": `${title}. Arrow keys read cells.`, style: { height: `${height}px` } });
  const told = el("p", { class: "told", "aria-live": "polite" });
  const map = new HeatMap(canvas, options);
  listenToCells(map, told);
  return { map, element: card(title, note, controls, el("div", { class: "plot" }, canvas), told) };
}

function unpackExperts(run) {
  const made = run.experts;
  if (!made.table) Object.assign(made, { table: unpack(made.load), places: unpackPlaces(made) });
  const [, layers, experts] = made.shape;
  made.at = (snapshot, layer, expert) => made.table[(snapshot * layers + layer) * experts + expert] / 1000;
  made.most = (snapshot, layer) => {
    let most = 0;
    for (let expert = 0; expert < experts; expert++) most = Math.max(most, made.at(snapshot, layer, expert));
    return most;
  };
  return made;
}

/** What the map of a choice shows: rows, columns and values. */
function expertView(made, view, layer) {
  const [snapshots, layers, experts] = made.shape, step = (i) => made.places.step[i];
  const common = { colour: loadColour, text: (value) => value.toFixed(2), numbers: true, xUnit: "steps", columnName: (i) => countText(step(i)), columns: snapshots };
  if (view === "end") {
    return { ...common, rows: layers, columns: experts, value: (row, column) => made.at(snapshots - 1, row, column),
      rowName: (row) => String(row), columnName: (column) => String(column), xUnit: `experts, at step ${exactText(step(snapshots - 1))}`, yUnit: "layer",
      tell: (row, column) => `layer ${row}, expert ${column}: ${timesText(made.at(snapshots - 1, row, column))} the even share` };
  }
  if (view === "layer") {
    return { ...common, rows: experts, value: (row, column) => made.at(column, layer, row), rowName: (row) => String(row), yUnit: `expert of layer ${layer}`,
      tell: (row, column) => `layer ${layer}, expert ${row}, step ${exactText(step(column))}: ${timesText(made.at(column, layer, row))} the even share` };
  }
  return { ...common, rows: layers, value: (row, column) => made.most(column, row), rowName: (row) => String(row), yUnit: "layer",
    tell: (row, column) => `layer ${row}, step ${exactText(step(column))}: its busiest expert has ${timesText(made.most(column, row))} the even share` };
}

function expertsSection() {
  const runs = DATA.runs.filter((run) => run.experts);
  if (!runs.length) return null;
  const chosen = { run: 0, view: "busiest", layer: 0 };
  const hint = "Point at a cell, or use the arrow keys, to read it.";
  const layerBox = el("span", {});
  const { map, element } = mapCard("Load of experts", "over the even share, before drops", [], 280, { hint, ...expertView(unpackExperts(runs[0]), "busiest", 0) });
  const show = () => {
    const made = unpackExperts(runs[chosen.run]);
    chosen.layer = Math.min(chosen.layer, made.shape[1] - 1);
    layerBox.replaceChildren(...(chosen.view === "layer" ? [select("Layer", Array.from({ length: made.shape[1] }, (_, i) => `layer ${i}`), chosen.layer, (i) => { chosen.layer = i; show(); })] : []));
    Object.assign(map, expertView(made, chosen.view, chosen.layer));
    map.canvas.style.height = `${Math.min(620, Math.max(180, 46 + 17 * map.rows))}px`;
    map.refresh();
  };
  const views = choice("What is shown", [["busiest", "Busiest of each layer"], ["layer", "One layer"], ["end", "At the end"]], "busiest", (view) => { chosen.view = view; show(); });
  const whose = runs.length > 1 ? select("Run", runs.map((run) => run.name), 0, (i) => { chosen.run = i; show(); }) : null;
  element.querySelector(".controls").append(...[whose, views, layerBox].filter(Boolean));
  element.classList.add("wide");
  element.append(loadScale());
  show();
  return section("experts", "Experts", el("div", { class: "grid" }, element, lastLayers(runs)));
}

/** The colours of loads, with their figures. */
function loadScale() {
  return el("div", { class: "scale" }, el("span", { text: "¼×" }), el("i", { class: "ramp load" }), el("span", { text: "4×" }), el("span", { class: "note", text: "grey is the even share" }));
}

/** Entropy and drops of each layer at the last snapshot. */
function lastLayers(runs) {
  const found = runs.filter((run) => run.experts.entropy.length);
  if (!found.length) return null;
  const rows = found.flatMap((run) => run.experts.entropy.map((entropy, layer) => {
    const made = unpackExperts(run), last = made.shape[0] - 1;
    return [found.length > 1 ? runName(run) : null, String(layer), figureText(entropy), figureText(Math.log(made.shape[2])), percentText(run.experts.drops[layer]), timesText(made.most(last, layer))]
      .slice(found.length > 1 ? 0 : 1);
  }));
  const columns = ["Run", "#Layer", "#Entropy, nats", "#Even", "#Dropped", "#Busiest"].slice(found.length > 1 ? 0 : 1);
  const made = card("Layers at the end", "router's entropy, drops, busiest expert", [], tableOf(columns, rows, { label: "Layers at the end" }));
  made.classList.add("wide", "short");
  return made;
}

/** One map for each kind of needle, depth by length, of the evaluation that is chosen. */
function needlesSection() {
  const runs = DATA.runs.filter((run) => run.needles.length);
  if (!runs.length) return null;
  const box = el("div", { class: "grid" });
  const chosen = { run: 0, evaluation: runs[0].needles.length - 1 };
  const stepBox = el("span", {});
  const show = () => {
    const all = runs[chosen.run].needles;
    stepBox.replaceChildren(select("Evaluation", all.map((one) => `step ${exactText(one.step)}: ${figureText(one.needles)}%`), chosen.evaluation, (i) => { chosen.evaluation = i; show(); }));
    for (const canvas of box.querySelectorAll("canvas")) forget(canvas);
    box.replaceChildren(...needleCards(all[chosen.evaluation]));
  };
  const whose = runs.length > 1 ? select("Run", runs.map((run) => run.name), 0, (i) => { chosen.run = i; chosen.evaluation = runs[i].needles.length - 1; show(); }) : null;
  show();
  const scale = el("div", { class: "scale" }, el("span", { text: "0%" }), el("i", { class: "ramp share" }), el("span", { text: "100% of samples answered right; * the held-out text repeats" }));
  return section("needles", "Needles", el("div", { class: "pick" }, whose, stepBox, scale), box);
}

function forget(canvas) {
  watcher.unobserve(canvas);
  charts.splice(charts.findIndex((one) => one.canvas === canvas), 1);
}

function needleCards(evaluation) {
  const kinds = [...new Set(evaluation.cells.map((cell) => cell[0]))];
  return kinds.map((kind) => {
    const cells = evaluation.cells.filter((cell) => cell[0] === kind);
    const lengths = [...new Set(cells.map((cell) => cell[1]))].sort((a, b) => a - b), depths = [...new Set(cells.map((cell) => cell[2]))].sort((a, b) => a - b);
    const found = new Map(cells.map((cell) => [`${cell[1]}/${cell[2]}`, cell]));
    const at = (row, column) => found.get(`${lengths[column]}/${depths[row]}`);
    const mean = cells.reduce((sum, cell) => sum + cell[3], 0) / cells.length;
    return mapCard(kind, null, [el("b", { class: "last", text: `${figureText(mean)}%` })], 60 + 26 * depths.length, {
      rows: depths.length, columns: lengths.length, numbers: true, xUnit: "tokens", yUnit: "depth", hint: "\u00a0",
      value: (row, column) => (at(row, column) ? at(row, column)[3] : NaN), colour: (value) => scaleColour(value / 100), text: (value) => String(Math.round(value)),
      rowName: (row) => `${Math.round(100 * depths[row])}%`, columnName: (column) => lengthText(lengths[column]) + (at(0, column) && at(0, column)[4] > 1 ? "*" : ""),
      tell: (row, column) => `${exactText(lengths[column])} tokens, depth ${Math.round(100 * depths[row])}%: ${at(row, column) ? `${figureText(at(row, column)[3])}% right` : "not evaluated"}`,
    }).element;
  });
}
