// Tables: phases, validations, checkpoints, launches, skipped steps, options, environment, log.

/** A table of all runs' rows, with a column for the run where there are several. */
function joinedTable(columns, name, rowOf, label) {
  const many = DATA.runs.length > 1;
  const rows = DATA.runs.flatMap((run) => run[name].map((one) => {
    const row = rowOf(one, run), made = many ? [runName(run), ...row] : row;
    made.mark = row.mark;
    return made;
  }));
  return rows.length ? tableOf(many ? ["Run", ...columns] : columns, rows, { label }) : null;
}

function stepsOf(first, last) {
  return first === last ? exactText(first) : `${exactText(first)} – ${exactText(last)}`;
}

function phasesSection() {
  const columns = ["Phase", "#Tokens a row", "#RoPE base", "#Steps", "#Tokens", "#Batch", "#Last loss", "#Tokens/s", "#MFU", "#Memory", "#Predicted", "#Dropped", "#Skipped"];
  const table = joinedTable(columns, "phases", (one) => [one.name, lengthText(one.seq_len), countText(one.rope_base), stepsOf(one.first_step, one.last_step), countText(one.tokens),
    one.batch.length > 4 ? `${countText(one.batch[0])} → … → ${countText(one.batch[one.batch.length - 1])}` : one.batch.map(countText).join(" → "),
    lossText(one.loss), countText(one.tokens_per_s), percentText(one.mfu), gibText(one.memory_gib), gibText(one.memory_predicted_gib), percentText(one.drop_rate), exactText(one.skipped)], "Phases");
  const layouts = joinedTable(["#From step", "Layout", "What changed", "#Boundary took"], "layouts", (one) => [exactText(one.step), String(one.layout), String(one.layout_changed), secondsText(one.layout_s)], "Layouts");
  return section("phases", "Phases", table, layouts ? [el("h3", { text: "Boundaries between layouts" }), layouts] : null);
}

function ledgerSection() {
  const table = joinedTable(["#Step", "What", "Phase", "#Rows", "#Loss", "#Limit", "#Gradient norm", "#Limit"], "ledger", (one) => {
    if (one.kind === "rollback") {
      const last = one.left_out[one.left_out.length - 1];
      const row = [exactText(one.step), `rolled back to step ${exactText(one.to_step)}`, null, last ? `${stepsOf(last.first, last.end - 1)} left out` : null, null, null, null, null];
      row.mark = "bad";
      return row;
    }
    return [exactText(one.step), one.kind + (one.undone ? ", undone by a rollback" : ""), one.phase, stepsOf(one.first_row, one.first_row + one.rows - 1), figureText(one.loss), figureText(one.loss_limit), figureText(one.grad_norm), figureText(one.grad_norm_limit)];
  }, "Skipped steps and rollbacks");
  if (!table) return null;
  const cut = DATA.runs.filter((run) => run.ledger_rows > run.ledger.length);
  return section("ledger", "Skipped batches and rollbacks", table, cut.map((run) => el("p", { class: "help", text: `${run.name}: the last ${run.ledger.length} of ${run.ledger_rows} are shown; ledger.jsonl has all.` })));
}

function checkpointsSection() {
  const table = joinedTable(["#Step", "#Tokens", "Written", "#Size", "#Files", "Layout", "#Held-out loss", "State"], "checkpoints", (one) => {
    const marks = [one.phase_end && "end of a phase", one.aside && `set aside (${one.aside})`].filter(Boolean);
    const row = [exactText(one.step), countText(one.tokens), timeText(one.time), bytesText(one.bytes), exactText(one.files), one.layout, lossText(one.valid_loss), one.damage ? `damaged: ${one.damage}` : ["names and sizes agree", ...marks].join(", ")];
    row.mark = one.damage ? "bad" : one.aside ? "past" : null;
    return row;
  }, "Checkpoints");
  return table && section("checkpoints", "Checkpoints", table, el("p", { class: "help", text: "Tensors were not read: launch/checkpoint.py --verify reads them against their checksums." }));
}

function validationsSection() {
  const table = joinedTable(["#Step", "#Tokens", "#Loss, nats a token", "#Bits per byte"], "validations", (one) => [exactText(one.step), countText(one.tokens), lossText(one.val_loss), lossText(one.val_bits_per_byte)], "Validations");
  return table && section("validations", "Validations", table);
}

function launchesSection() {
  const table = joinedTable(["Began", "#From step", "#To step", "Ended", "Device", "#Processes", "Layout", "Host", "Code"], "launches", (one) => {
    const end = one.end === null ? "no end on record" : one.why || "as planned";
    const row = [timeText(one.time), exactText(one.step), exactText(one.end), end, one.device, exactText(one.processes), one.layout, one.host, one.commit ? String(one.commit).slice(0, 10) : one.mmtrain];
    row.mark = one.why ? "bad" : null;
    return row;
  }, "Launches");
  return table && section("launches", "Launches", table);
}

/** Options of all runs; what differs between them is marked, and can be shown alone. */
function optionsSection() {
  const runs = DATA.runs.filter((run) => Object.keys(run.options).length);
  if (!runs.length) return null;
  const places = [...new Set(runs.flatMap((run) => Object.keys(run.options)))];
  const differs = new Set(places.filter((place) => new Set(runs.map((run) => run.options[place])).size > 1));
  const chosen = { text: "", differing: runs.length > 1 && differs.size > 0 };
  const box = el("div", {});
  const show = () => {
    const found = places.filter((place) => (!chosen.differing || differs.has(place)) && `${place} ${runs.map((run) => run.options[place]).join(" ")}`.toLowerCase().includes(chosen.text));
    const rows = found.map((place) => Object.assign([place, ...runs.map((run) => run.options[place])], { mark: differs.has(place) ? "differs" : null }));
    box.replaceChildren(found.length ? tableOf(["Option", ...runs.map((run) => (runs.length > 1 ? run.name : "Value"))], rows, { label: "Options", kind: "options" }) : el("p", { class: "help", text: "No option fits." }));
  };
  const search = el("input", { type: "search", placeholder: `Search ${places.length} options`, "aria-label": "Search options", on: { input: (event) => { chosen.text = event.target.value.toLowerCase(); show(); } } });
  const only = runs.length > 1 ? toggle(`Only the ${differs.size} that differ`, chosen.differing, (on) => { chosen.differing = on; show(); }) : null;
  show();
  return section("options", "Configuration", el("div", { class: "pick" }, search, only), box);
}

function environmentSection() {
  const runs = DATA.runs.filter((run) => Object.keys(run.about).length);
  if (!runs.length) return null;
  const skip = new Set(["step", "last_step", "time"]);
  const places = [...new Set(runs.flatMap((run) => Object.keys(run.about)))].filter((place) => !skip.has(place));
  const text = (value) => (known(value) ? exactText(value) : value === null || value === undefined ? null : String(value));
  return section("environment", "Environment", tableOf(["", ...runs.map((run) => (runs.length > 1 ? run.name : "Last launch"))], places.map((place) => [place, ...runs.map((run) => text(run.about[place]))]), { label: "Environment", kind: "options" }));
}

function logSection() {
  const runs = DATA.runs.filter((run) => run.log.length);
  if (!runs.length) return null;
  return section("log", "Log", runs.map((run) => el("details", { open: false },
    el("summary", { text: `${DATA.runs.length > 1 ? `${run.name}: ` : ""}last ${run.log.length} lines of log.txt` }),
    el("pre", { class: "log", tabindex: "0", text: run.log.map(([time, line]) => `${time}  ${line}`).join("\n") }))));
}
