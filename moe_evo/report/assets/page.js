// The page: which run is shown, what is redrawn when, and the controls.
"use strict";

const $ = (selector) => document.querySelector(selector);
let shownRun = null;

function lineageTable(lineage) {
  const rows = lineage.number.map((number, row) => [
    `#${number}`, operatorName(lineage.operators[lineage.operator[row]]),
    lineage.parents[row].map((one) => `#${one}`).join(" and ") || "–", decimals(lineage.fitness[row], 4),
  ]);
  return tableOf(["candidate", "made by", "of", lineage.label], rows.reverse());
}

async function drawRun(number) {
  const article = $(`#run-${number}`);
  const data = await runData(number);
  const find = (name) => article.querySelector(`.${name}`);
  if (data.curve.total) await searchPlot(find("curve"), find("curve-legend"), data.curve);
  else find("curve").textContent = "Nothing is evaluated yet.";
  const choice = find("map-choice");
  if (choice && !choice.options.length) {
    fillSelect(choice, data.maps.map((map, place) => [place, map.title]), 0);
    choice.addEventListener("change", () => drawMap(find, data));
  }
  if (data.maps.length) await drawMap(find, data);
  if (data.lineage.number.length) {
    await lineagePlot(find("lineage"), data.lineage);
    find("lineage-table").replaceChildren(lineageTable(data.lineage));
  } else find("lineage").textContent = "There is no winner yet.";
}

async function drawMap(find, data) {
  const map = data.maps[Number(find("map-choice").value)];
  const kept = map.num_kept.reduce((sum, one) => sum + one, 0);
  const all = map.weights.flat().filter((weight) => weight !== null).length;
  find("map-text").textContent =
    `${kept} of ${all} experts in ${map.layers.length} layers; ` +
    (map.slots.length ? "dark: kept whole, pale: merged in part." : "dark: kept.");
  find("negative-key").hidden = !map.weights.flat().some((weight) => weight < 0);
  await expertMap(find("map"), map);
}

async function showRun(number) {
  for (const article of document.querySelectorAll("article.run")) {
    const isShown = article.id === `run-${number}`;
    if (!isShown) article.querySelectorAll(".plot").forEach(clearPlot);
    article.hidden = !isShown;
  }
  shownRun = number;
  const select = $("#run-choice");
  if (select) select.value = String(number);
  await drawRun(number);
}

async function drawPareto() {
  const [group, size, split] = ["#pareto-group", "#pareto-size", "#pareto-split"].map((id) => $(id).value);
  await paretoPlot($("#pareto .plot"), $("#pareto .legend"), { group, size, split });
}

function startPareto() {
  const groups = [...new Set(index.lines.map((line) => line.group))];
  fillSelect($("#pareto-group"), groups.map((group) => [group, group]), groups[0]);
  $("#pareto-group").closest("label").hidden = groups.length < 2;
  const sizes = [["share", "share of experts kept"]];
  if (index.lines.some((line) => line.parameters)) sizes.push(["parameters", "parameters"]);
  fillSelect($("#pareto-size"), sizes, "share");
  $("#pareto-size").closest("label").hidden = sizes.length < 2;
  const splits = SPLITS.filter((split) => index.lines.some((line) => line[split]));
  fillSelect($("#pareto-split"), splits.map((split) => [split, split]), splits[0]);
  for (const id of ["#pareto-group", "#pareto-size", "#pareto-split"]) $(id).addEventListener("change", drawPareto);
}

function startRuns() {
  const table = $("#runs table");
  makeSortable(table);
  const filter = () => {
    const shown = filterRows(table, $("#filter").value, $("#filter-key").value);
    $("#filter-count").textContent = `${shown} ${shown === 1 ? "line" : "lines"}`;
  };
  $("#filter").addEventListener("input", filter);
  $("#filter-key").addEventListener("change", filter);
  filter();
  table.addEventListener("click", (event) => {
    const run = event.target.closest("a[data-run]");
    if (run) showRun(Number(run.dataset.run));
  });
  const names = index.runs.map((run, number) => [number, run.finished ? run.label : `${run.label} (unfinished)`]);
  fillSelect($("#run-choice"), names, 0);
  $("#run-choice").addEventListener("change", (event) => {
    showRun(Number(event.target.value));
    $("#run").scrollIntoView();
  });
  fillSelect($("#first"), names, 0);
  fillSelect($("#second"), names, 1);
  for (const id of ["#first", "#second"]) $(id).addEventListener("change", compareRuns);
}

const compareRuns = () => drawComparison($("#compare"), Number($("#first").value), Number($("#second").value));

async function drawAll() {
  await showRun(shownRun ?? 0);
  await drawPareto();
  if (index.runs.length > 1) await compareRuns();
}

let redrawing = null;

/** Draw everything anew, once for all reasons that come within a moment. */
function redraw() {
  clearTimeout(redrawing);
  redrawing = setTimeout(drawAll, 150);
}

async function start() {
  startPareto();
  if (index.runs.length > 1) startRuns();
  for (const button of document.querySelectorAll("button.copy")) {
    button.addEventListener("click", async () => {
      await copyText(button.parentElement.querySelector("code").textContent);
      button.textContent = "copied";
      setTimeout(() => (button.textContent = "copy"), 1500);
    });
  }
  await drawAll();
  for (const query of ["(prefers-color-scheme: dark)", "(max-width: 640px)"]) {
    window.matchMedia(query).addEventListener("change", redraw);
  }
  document.documentElement.dataset.ready = "true";
}

start();
