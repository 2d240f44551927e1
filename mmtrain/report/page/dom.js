// Elements. Texts are set as text: nothing that a run holds is ever read as HTML.

function el(name, options, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(options || {})) {
    if (key === "text") made.textContent = value;
    else if (key === "on") for (const [event, call] of Object.entries(value)) made.addEventListener(event, call);
    else if (key === "style") for (const [property, text] of Object.entries(value)) made.style.setProperty(property, text);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) if (child !== null && child !== undefined) made.append(child);
  return made;
}

/** A table that scrolls within itself. Cells are texts or elements; columns that begin with "#" hold numbers. */
function tableOf(columns, rows, options) {
  const numeric = columns.map((name) => name.startsWith("#"));
  const head = el("tr", {}, columns.map((name, i) => el("th", { class: numeric[i] ? "number" : null, scope: "col", text: name.replace("#", "") })));
  const body = rows.map((row) => el("tr", { class: row.mark || null }, row.map((cell, i) => el("td", { class: numeric[i] ? "number" : null }, cell === null || cell === undefined || cell === "" ? NONE : cell))));
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": (options && options.label) || "table" },
    el("table", { class: (options && options.kind) || null }, el("thead", {}, head), el("tbody", {}, body)));
}

/** A choice of one of a few, as joined buttons. */
function choice(label, values, chosen, call) {
  const buttons = values.map(([value, text]) => el("button", {
    type: "button", "aria-pressed": String(value === chosen), text,
    on: { click: () => {
      buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(values[i][0] === value)));
      call(value);
    } },
  }));
  return el("div", { class: "choice", role: "group", "aria-label": label }, buttons);
}

function toggle(text, on, call, title) {
  const button = el("button", { type: "button", class: "toggle", "aria-pressed": String(on), title, text, on: { click: () => {
    const now = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(now));
    call(now);
  } } });
  return button;
}

function select(label, values, chosen, call) {
  const made = el("select", { "aria-label": label, on: { change: () => call(Number(made.value)) } },
    values.map((text, i) => el("option", { value: i, selected: i === chosen, text })));
  return made;
}

/** A swatch and a name: how runs are told apart. */
function runName(run) {
  return el("span", { class: "run" }, swatch(DATA.runs.indexOf(run)), el("span", { text: run.name }));
}

function swatch(index) {
  return el("i", { class: index < 8 ? "swatch" : "swatch dashed", style: { "--c": `var(--run-${index % 8})` } });
}

function section(id, title, ...children) {
  return el("section", { id, "aria-labelledby": `${id}-title` }, el("h2", { id: `${id}-title`, text: title }), children);
}

function card(title, note, controls, ...children) {
  return el("figure", { class: "card" },
    el("figcaption", {}, el("span", { class: "head" }, el("span", { class: "title", text: title }), note ? el("span", { class: "note", text: note }) : null),
      el("span", { class: "controls" }, controls)), children);
}
