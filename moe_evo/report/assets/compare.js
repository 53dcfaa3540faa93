// Two runs side by side: scores, what differs in their configs, and the experts that their winners keep.
"use strict";

const SPLITS = ["test", "validation", "search"];

function tableOf(headings, rows) {
  const head = element("tr", {}, ...headings.map((text, column) =>
    element("th", { scope: "col", ...(column && { class: "number" }) }, text)));
  const body = rows.map((cells) => element("tr", {}, ...cells.map((text, column) =>
    column ? element("td", { class: "number" }, text) : element("th", { scope: "row" }, text))));
  return element("table", {}, element("thead", {}, head), element("tbody", {}, ...body));
}

function scoreRows(first, second) {
  const line = (run, key) => index.lines.find((one) => one.run === run && one.key === key);
  const rows = [];
  for (const key of ["best", "best_pruning", "random_search", "frequency", "full"]) {
    const [a, b] = [line(first, key), line(second, key)];
    for (const split of SPLITS) {
      const [x, y] = [a?.[split], b?.[split]];
      if (!x && !y) continue;
      const change = x && y ? changeText(y[0] - x[0]) : "–";
      const name = key === "full" ? "full model" : KINDS[key].name;
      rows.push([`${name}, ${split}`, intervalText(x), intervalText(y), change]);
    }
  }
  return rows;
}

function changeText(change) {
  const text = decimals(Math.abs(change));
  return Number(text) === 0 ? text : `${change > 0 ? "+" : "−"}${text}`;
}

function configRows(first, second) {
  const text = (value) => (value === undefined ? "–" : typeof value === "string" ? value : JSON.stringify(value));
  const keys = [...new Set([...Object.keys(first), ...Object.keys(second)])].sort();
  return keys.filter((key) => text(first[key]) !== text(second[key]))
    .map((key) => [key, text(first[key]), text(second[key])]);
}

async function drawComparison(section, first, second) {
  const [a, b] = await Promise.all([runData(first), runData(second)]);
  const find = (name) => section.querySelector(`.${name}`);
  find("scores").replaceChildren(tableOf(["", "A", "B", "B − A"], scoreRows(first, second)));
  const rows = configRows(a.config, b.config);
  find("differences").replaceChildren(
    rows.length ? tableOf(["option", "A", "B"], rows) : element("p", {}, "Both have the same config."));
  const maps = [a, b].map((data) => data.maps.find((map) => map.key === "best"));
  for (const [name, map, run] of [["map-a", maps[0], first], ["map-b", maps[1], second]]) {
    find(`${name}-title`).textContent = `${name.endsWith("a") ? "A" : "B"}: ${index.runs[run].label}`;
    if (map) await expertMap(find(name), map);
    else clearPlot(find(name));
  }
  const shape = (map) => map?.weights.map((row) => row.length).join();
  const comparable = maps[0] && maps[1] && shape(maps[0]) === shape(maps[1]);
  find("overlap").hidden = !comparable;
  if (comparable) {
    const { both, either } = overlap(...maps);
    find("overlap-text").textContent =
      `Of the ${either} experts that A or B keeps, both keep ${both} (${Math.round((100 * both) / either)} %); ` +
      "of what is merged, the expert with the largest weight in its slot counts.";
    await overlapMap(find("map-both"), ...maps);
  }
}
