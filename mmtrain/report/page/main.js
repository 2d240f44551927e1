// The page, put together.

function pageHeader(links) {
  const names = [...DATA.runs, ...DATA.sweeps].map((one) => one.name);
  const title = names.length > 3 ? `${names.slice(0, 3).join(", ")} and ${names.length - 3} more` : names.join(", ");
  return el("header", {},
    el("div", { class: "top" }, el("h1", { text: title }), el("button", { type: "button", class: "theme", title: "Light or dark", "aria-label": "Switch between light and dark", text: "◐", on: { click: toggleTheme } })),
    el("p", { class: "paths", text: [...DATA.runs, ...DATA.sweeps].map((one) => one.path).join("   ") }),
    el("nav", { "aria-label": "Sections" }, links));
}

function build() {
  const hasRuns = DATA.runs.length > 0;
  const made = [
    hasRuns && summarySection(), ...DATA.sweeps.map(sweepSection), hasRuns && curvesSection(), expertsSection(), needlesSection(), evalsSection(),
    hasRuns && phasesSection(), ledgerSection(), validationsSection(), checkpointsSection(), launchesSection(), optionsSection(), environmentSection(), logSection(),
  ].filter(Boolean);
  const links = made.map((one) => el("a", { href: `#${one.id}`, text: one.querySelector("h2").textContent }));
  const curves = made.findIndex((one) => one.id === "curves");
  if (curves >= 0) made.splice(curves, 0, toolbar());
  const footer = el("footer", { text: `Written ${DATA.made.time} by mmtrain ${DATA.made.version}. This file fetches nothing.` });
  document.getElementById("page").replaceChildren(pageHeader(links), el("main", {}, made), footer);
}

build();
