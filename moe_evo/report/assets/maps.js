// Maps of experts: a row a MoE layer, a column an expert.
"use strict";

/** Mix of two #rrggbb colours; share 0 is the first, 1 the second. */
function mixed(from, to, share) {
  const part = (text, at) => parseInt(text.slice(at, at + 2), 16);
  return `#${[1, 3, 5].map((at) => Math.round(part(from, at) + share * (part(to, at) - part(from, at)))
    .toString(16).padStart(2, "0")).join("")}`;
}

/** The square root of the weight, so that small parts are seen; negative weights have a colour of their own. */
function weightColour(thousandths) {
  const share = Math.min(Math.sqrt(Math.abs(thousandths) / 1000), 1);
  return mixed(colour("empty"), colour(thousandths < 0 ? "negative" : "kept"), share);
}

/** Cells as [row, column, colour, text] in a grid; texts stand in the tooltip. */
async function gridPlot(target, { rows, width, cells }) {
  const most = isNarrow() ? 380 : 560;
  const cell = Math.min(30, most / rows.length);
  const plot = emptyFigure({
    x_axis_label: "expert", y_axis_label: "MoE layer", tools: "box_zoom,reset,save",
    height: Math.round(Math.max(rows.length * cell, 60)) + 90,
    x_range: [-0.5, width - 0.5], y_range: [rows.length - 0.5, -0.5],
  });
  for (const grid of plot.grids) grid.grid_line_color = null;
  const every = Math.max(1, Math.ceil(width / (isNarrow() ? 8 : 16)));
  plot.xaxes[0].ticker = new Bokeh.FixedTicker({ ticks: [...Array(width).keys()].filter((one) => one % every === 0) });
  const step = Math.max(1, Math.ceil(rows.length / 16));
  const ticks = rows.map((_, place) => place).filter((place) => place % step === 0);
  plot.yaxes[0].ticker = new Bokeh.FixedTicker({ ticks });
  plot.yaxes[0].major_label_overrides = new Map(ticks.map((place) => [place, String(rows[place])]));
  const [y, x, tone, text] = columns(cells);
  const gap = width > 48 || rows.length > 32 ? 0.98 : 0.92;
  const drawn = plot.rect({ field: "x" }, { field: "y" }, gap, gap, {
    source: source({ x, y, tone, text, layer: y.map((place) => rows[place]) }),
    fill_color: { field: "tone" }, line_color: null,
  });
  plot.add_tools(hover([drawn], "layer @layer, expert @x", [["", "@text"]], { point_policy: "follow_mouse" }));
  await showPlot(target, plot);
}

/** How much of each expert one contender keeps. */
function expertMap(target, map) {
  const cells = [];
  map.weights.forEach((weights, row) => weights.forEach((weight, expert) => {
    if (weight !== null) cells.push([row, expert, weightColour(weight), weightText(map, row, expert, weight)]);
  }));
  return gridPlot(target, { rows: map.layers, width: map.weights[0].length, cells });
}

function weightText(map, row, expert, weight) {
  if (weight === 0) return "dropped";
  if (!map.slots.length) return "kept";
  return `weight ${(weight / 1000).toFixed(3)} in slot ${map.slots[row][expert]}`;
}

/** Which expert leads each slot: of a pruning, the kept experts of a layer. */
function leaders(map, row) {
  const best = new Map();
  map.weights[row].forEach((weight, expert) => {
    if (!weight) return;
    const slot = map.slots.length ? map.slots[row][expert] : expert;
    if (!best.has(slot) || Math.abs(weight) > Math.abs(map.weights[row][best.get(slot)])) best.set(slot, expert);
  });
  return new Set(best.values());
}

/** Two contenders in one map: led by both, by one alone, by none. */
function overlapMap(target, first, second) {
  const cells = [];
  first.weights.forEach((weights, row) => {
    const [a, b] = [leaders(first, row), leaders(second, row)];
    weights.forEach((weight, expert) => {
      if (weight === null) return;
      const both = a.has(expert) && b.has(expert);
      const tone = both ? "ink" : a.has(expert) ? "run-a" : b.has(expert) ? "run-b" : "empty";
      const text = both ? "kept by both" : a.has(expert) ? "kept by A alone" : b.has(expert) ? "kept by B alone" : "dropped";
      cells.push([row, expert, colour(tone), text]);
    });
  });
  return gridPlot(target, { rows: first.layers, width: first.weights[0].length, cells });
}

/** Of the experts that either keeps, the share that both keep. */
function overlap(first, second) {
  let [both, either] = [0, 0];
  first.weights.forEach((_, row) => {
    const [a, b] = [leaders(first, row), leaders(second, row)];
    for (const expert of new Set([...a, ...b])) {
      either += 1;
      both += a.has(expert) && b.has(expert);
    }
  });
  return { both, either };
}
