// Results of launch/eval.py: scores by task and length, by depth, loss by position, questions of files.

function evalsSection() {
  const runs = DATA.runs.filter((run) => run.evaluations.length);
  if (!runs.length) return null;
  const chosen = { run: 0, one: runs[0].evaluations.length - 1 };
  const box = el("div", { class: "parts" }), pick = el("span", {});
  const show = () => {
    const all = runs[chosen.run].evaluations;
    pick.replaceChildren(select("Results", all.map((one) => `${known(one.step) ? `step ${exactText(one.step)}: ` : ""}${one.name}`), chosen.one, (i) => { chosen.one = i; show(); }));
    for (const canvas of box.querySelectorAll("canvas")) forget(canvas);
    box.replaceChildren(...evaluationParts(all[chosen.one]));
  };
  const whose = runs.length > 1 ? select("Run", runs.map((run) => run.name), 0, (i) => { chosen.run = i; chosen.one = runs[i].evaluations.length - 1; show(); }) : null;
  show();
  return section("evals", "Evaluations", el("div", { class: "pick" }, whose, pick), box);
}

function evaluationParts(one) {
  const maps = one.cells.length ? el("div", { class: "grid" }, needleCards(one)) : null;
  const files = one.files.map(([name, count, ...rest]) => [name, exactText(count), ...rest.slice(0, 4).map(figureOrNone), rest[4] ? exactText(rest[4]) : null]);
  return [
    one.rows.length ? scoresTable(one.rows) : null, maps,
    one.perplexity.length ? positionsTable(one.perplexity) : null,
    files.length ? tableOf(["From files", "#Questions", "#acc, %", "#acc_norm, %", "#log acc_norm²", "#chrF", "#Left out as too long"], files, { label: "Questions of files" }) : null,
  ].filter(Boolean);
}

function figureOrNone(value) {
  return known(value) ? figureText(value) : null;
}

/** A row for each task, a column for each length. */
function scoresTable(rows) {
  const lengths = [...new Set(rows.map((row) => row[1]))].sort((a, b) => a - b), tasks = [...new Set(rows.map((row) => row[0]))];
  const found = new Map(rows.map((row) => [`${row[0]}/${row[1]}`, row]));
  const body = tasks.map((task) => [task, ...lengths.map((length) => { const row = found.get(`${task}/${length}`); return row ? figureText(row[2]) : null; })]);
  return tableOf(["% of answers found", ...lengths.map((length) => `#${lengthText(length)}`)], body, { label: "Scores by task and length" });
}

/** A row for each bucket of positions, a column for each length. */
function positionsTable(losses) {
  const most = losses.reduce((longest, one) => (one.buckets.length > longest.buckets.length ? one : longest));
  const at = (one, first) => one.buckets.find((bucket) => bucket[0] === first);
  const body = most.buckets.map(([first, last]) => [`${exactText(first)} – ${exactText(last)}`, ...losses.map((one) => { const bucket = at(one, first); return bucket ? lossText(bucket[2]) : null; })]);
  const all = ["all", ...losses.map((one) => lossText(one.loss))];
  return tableOf(["Position in the row", ...losses.map((one) => `#Loss in rows of ${lengthText(one.length)}`)], [...body, all], { label: "Loss by position" });
}
