// Plots with Bokeh. Each function draws into an element and is called again when size class or colours change.
"use strict";

const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif";
const isNarrow = () => window.matchMedia("(max-width: 640px)").matches;
const isTouch = () => window.matchMedia("(pointer: coarse)").matches;
const views = new Map();

/** Remove what is drawn in an element. */
function clearPlot(target) {
  if (views.has(target)) discard(views.get(target));
  views.delete(target);
  target.replaceChildren();
}

/** Bokeh keeps what it has shown until it is told not to. */
function discard(view) {
  const place = Bokeh.documents.indexOf(view.model.document);
  if (place >= 0) Bokeh.documents.splice(place, 1);
  view.remove();
  Bokeh.index.delete(view);
}

async function showPlot(target, plot) {
  clearPlot(target);
  const view = await Bokeh.Plotting.show(plot, target);
  if (views.has(target)) discard(view); // drawn again while it was being drawn
  else views.set(target, view);
}

/** An empty figure in the page's colours; options as Bokeh's figure takes them. */
function emptyFigure(options) {
  const plot = Bokeh.Plotting.figure({
    sizing_mode: "stretch_width",
    height: isNarrow() ? 280 : 360,
    tools: "box_zoom,wheel_zoom,pan,reset,save",
    toolbar_location: "above",
    output_backend: "canvas",
    ...options,
  });
  plot.toolbar.logo = null;
  plot.toolbar.autohide = !isTouch();
  plot.toolbar.active_drag = null; // a finger or a wheel scrolls the page until a tool is chosen
  plot.toolbar.active_scroll = null;
  plot.background_fill_color = colour("card");
  plot.border_fill_color = colour("card");
  plot.outline_line_color = null;
  plot.min_border_right = 12;
  for (const axis of plot.axes) {
    axis.axis_label_text_font = axis.major_label_text_font = FONT;
    axis.axis_label_text_font_style = "normal";
    axis.axis_label_text_font_size = "13px";
    axis.major_label_text_font_size = "12px";
    axis.axis_label_text_color = axis.major_label_text_color = colour("muted");
    axis.axis_line_color = axis.major_tick_line_color = colour("line");
    axis.minor_tick_line_color = null;
    axis.major_tick_in = 0;
  }
  for (const grid of plot.grids) grid.grid_line_color = colour("grid");
  return plot;
}

const source = (data) => new Bokeh.ColumnDataSource({ data });

/** A hover tool; lines are [name, placeholder], and Bokeh escapes what it puts in. */
function hover(renderers, title, lines, options = {}) {
  const rows = lines.map(([name, value]) => `<div><span style="opacity:.7">${name}</span> ${value}</div>`).join("");
  const style =
    `margin:-5px;padding:6px 10px;max-width:18rem;overflow-wrap:anywhere;font:13px/1.4 ${FONT};` +
    `background:${colour("raised")};color:${colour("ink")}`;
  const tooltips = `<div style="${style.replaceAll('"', "")}"><b>${title}</b>${rows}</div>`;
  return new Bokeh.HoverTool({ renderers, tooltips, visible: false, ...options }); // no button: always on
}

/** A legend in HTML: it wraps on a phone and its entries are buttons that hide what they name. */
function legend(target, entries) {
  const buttons = entries.map(({ name, tone, mark, renderers }) => {
    const button = element("button", { type: "button", "aria-pressed": "true" });
    const swatch = element("span", { class: `swatch ${mark}` });
    swatch.style.color = tone;
    button.append(swatch, name);
    button.addEventListener("click", () => {
      const visible = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(visible));
      for (const renderer of renderers) renderer.visible = visible;
    });
    return button;
  });
  target.replaceChildren(...buttons);
}

/** A horizontal line that stays as wide as the plot. */
function level(plot, value, tone, dash = [6, 4]) {
  const span = new Bokeh.Span({
    dimension: "width", location: value, line_color: tone, line_width: 1.5, line_dash: dash,
  });
  plot.add_layout(span);
  return span;
}

const columns = (points) => points[0].map((_, column) => points.map((point) => point[column]));

/** Fitness of every evaluation, best so far, finalists on validation, phases, and the full model. */
async function searchPlot(target, legendTarget, curve) {
  const tones = curve.phase_tones.map(colour);
  const plot = emptyFigure({ x_axis_label: "evaluations", y_axis_label: curve.label });
  const entries = [];
  const numbers = curve.numbers.length ? curve.numbers : curve.positions.map((position) => position - 1);
  const points = curve.phase_names.map((name, phase) => {
    const chosen = curve.positions.map((_, place) => place).filter((place) => curve.phase[place] === phase);
    const pick = (values) => chosen.map((place) => values[place]);
    const data = source({
      x: pick(curve.positions), y: pick(curve.fitness), number: pick(numbers),
      made: pick(curve.operator).map((operator) => operatorName(curve.operators[operator])),
    });
    const drawn = plot.scatter({ field: "x" }, { field: "y" }, {
      source: data, size: 5, fill_color: tones[phase], line_color: null, fill_alpha: 0.55,
    });
    if (chosen.length) entries.push({ name, tone: tones[phase], mark: "dot", renderers: [drawn] });
    return drawn;
  });
  plot.add_tools(hover(points, "candidate @number", [["made by", "@made"], [curve.label, "@y{0.0000}"]]));
  const step = (rises, tone, name, width) => {
    if (!rises.length) return;
    const [x, y] = columns(rises);
    const drawn = plot.step(x, y, "after", { line_color: tone, line_width: width });
    entries.push({ name, tone, mark: "stroke", renderers: [drawn] });
  };
  step(curve.random_best, colour("muted"), "random search, best so far", 1.5);
  step(curve.best, colour("ink"), "best so far", 2);
  if (curve.validation.length) {
    const [x, number, y] = columns(curve.validation);
    const drawn = plot.scatter({ field: "x" }, { field: "y" }, {
      source: source({ x, number, y }), marker: "diamond", size: 10,
      fill_color: colour("validation"), line_color: colour("card"), line_width: 1,
    });
    plot.add_tools(hover([drawn], "candidate @number", [["on validation", "@y{0.0000}"]]));
    entries.push({ name: "finalists on validation", tone: colour("validation"), mark: "diamond", renderers: [drawn] });
  }
  if (curve.failed.length) {
    const values = [...curve.fitness, ...(curve.full === null ? [] : [curve.full])];
    const floor = values.length ? Math.min(...values) : 0;
    const [x, number, reason] = columns(curve.failed);
    const drawn = plot.scatter({ field: "x" }, { field: "y" }, {
      source: source({ x, number, reason, y: x.map(() => floor) }), marker: "x", size: 8, line_color: colour("bad"),
      line_width: 1.5,
    });
    plot.add_tools(hover([drawn], "candidate @number failed", [["", "@reason"]]));
    entries.push({ name: "failed", tone: colour("bad"), mark: "cross", renderers: [drawn] });
  }
  if (curve.full !== null) {
    const span = level(plot, curve.full, colour("full"));
    const unseen = plot.scatter([1], [curve.full], { size: 0 }); // so that the range reaches the line
    entries.push({ name: "full model", tone: colour("full"), mark: "dashed", renderers: [span, unseen] });
  }
  legend(legendTarget, entries);
  await showPlot(target, plot);
}

/** The winner's ancestors: each at the evaluation that it was, with lines to its parents. */
async function lineagePlot(target, lineage) {
  const plot = emptyFigure({ x_axis_label: "evaluations", y_axis_label: lineage.label, height: isNarrow() ? 260 : 300 });
  const place = new Map(lineage.number.map((number, row) => [number, row]));
  const edges = lineage.number.flatMap((_, child) =>
    lineage.parents[child].filter((parent) => place.has(parent)).map((parent) => [child, place.get(parent)]));
  const at = (values, end) => edges.map((edge) => values[edge[end]]);
  plot.segment(at(lineage.position, 0), at(lineage.fitness, 0), at(lineage.position, 1), at(lineage.fitness, 1), {
    line_color: colour("muted"), line_alpha: 0.35,
  });
  const isWinner = lineage.number.map((number) => number === lineage.winner);
  const drawn = plot.scatter({ field: "x" }, { field: "y" }, {
    source: source({
      x: lineage.position, y: lineage.fitness, number: lineage.number,
      made: lineage.operator.map((operator) => operatorName(lineage.operators[operator])),
      parents: lineage.parents.map((parents) => parents.map((one) => `#${one}`).join(", ") || "none"),
      tone: lineage.operator.map((operator) => colour(operatorTone(lineage.operators[operator]))),
      size: isWinner.map((winner) => (winner ? 18 : 7)),
      marker: isWinner.map((winner) => (winner ? "star" : "circle")),
    }),
    size: { field: "size" }, marker: { field: "marker" }, fill_color: { field: "tone" }, line_color: colour("card"),
  });
  plot.add_tools(hover([drawn], "candidate @number", [
    ["made by", "@made"], ["of", "@parents"], [lineage.label, "@y{0.0000}"],
  ]));
  await showPlot(target, plot);
}

function operatorTone(operator) {
  if (operator.startsWith("random") || operator === "identity") return "initial";
  return operator === "gaussian_mutation" ? "merging" : operator === "swap_mutation" ? "pruning" : "crossover";
}

const KINDS = {
  best: { name: "winner", tone: "merging", marker: "circle", mark: "dot" },
  best_pruning: { name: "best that only prunes", tone: "pruning", marker: "square", mark: "square" },
  frequency: { name: "frequency pruning", tone: "muted", marker: "triangle", mark: "triangle" },
  random_search: { name: "best of random", tone: "initial", marker: "diamond", mark: "diamond" },
};

/** Score against size over runs, with intervals, the full model as a line, and the front of the winners. */
async function paretoPlot(target, legendTarget, { group, size, split }) {
  const lines = index.lines.filter((line) => line.group === group && line[split] && line[size] !== null);
  const labels = { share: "share of experts kept", parameters: "parameters" };
  const plot = emptyFigure({ x_axis_label: labels[size], y_axis_label: `${split} score` });
  if (size === "share") plot.xaxes[0].formatter = new Bokeh.NumeralTickFormatter({ format: "0 %" });
  else plot.xaxes[0].formatter = new Bokeh.NumeralTickFormatter({ format: "0.[00] a" });
  const sizes = lines.map((line) => line[size]);
  const apart = 0.012 * (Math.max(...sizes) - Math.min(...sizes) || 1);
  const entries = [];
  for (const [key, kind] of Object.entries(KINDS)) {
    const members = lines.filter((line) => line.key === key);
    if (!members.length) continue;
    // those of one size stand side by side, so that intervals do not cover each other
    const seen = new Map();
    const kindShift = Object.keys(KINDS).indexOf(key) - 1.5;
    const x = members.map((line) => {
      const count = seen.get(line[size]) || 0;
      seen.set(line[size], count + 1);
      return line[size] + apart * (kindShift * 0.5 + (count % 2 ? -1 : 1) * Math.ceil(count / 2) * 0.25);
    });
    const data = source({
      x, y: members.map((line) => line[split][0]),
      low: members.map((line) => line[split][1] ?? line[split][0]),
      high: members.map((line) => line[split][2] ?? line[split][0]),
      run: members.map((line) => index.runs[line.run].label), title: members.map((line) => line.title),
      kept: members.map((line) => line.kept), text: members.map((line) => intervalText(line[split])),
    });
    const tone = colour(kind.tone);
    const bars = plot.segment({ field: "x" }, { field: "low" }, { field: "x" }, { field: "high" }, {
      source: data, line_color: tone, line_alpha: 0.45, line_width: 1.5,
    });
    const drawn = plot.scatter({ field: "x" }, { field: "y" }, {
      source: data, marker: kind.marker, size: 9, fill_color: key === "best" ? tone : colour("card"), line_color: tone,
      line_width: 1.5,
    });
    plot.add_tools(hover([drawn], "@title", [["run", "@run"], ["experts kept", "@kept"], ["", "@text"]]));
    entries.push({ name: kind.name, tone, mark: key === "best" ? "dot" : `${kind.mark} hollow`, renderers: [bars, drawn] });
  }
  const front = frontOf(lines.filter((line) => line.key === "best"), size, split);
  if (front.length > 1) {
    const [x, y] = columns(front);
    const drawn = plot.step(x, y, "after", { line_color: colour("merging"), line_alpha: 0.5, line_dash: [2, 3] });
    entries.push({ name: "front of the winners", tone: colour("merging"), mark: "dotted", renderers: [drawn] });
  }
  const full = lines.filter((line) => line.key === "full");
  const levels = [...new Set(full.map((line) => line[split][0]))];
  if (levels.length) {
    const spans = levels.map((value) => level(plot, value, colour("full")));
    const unseen = plot.scatter(full.map((line) => line[size]), full.map((line) => line[split][0]), { size: 0 });
    entries.push({ name: "full model", tone: colour("full"), mark: "dashed", renderers: [...spans, unseen] });
  }
  legend(legendTarget, entries);
  await showPlot(target, plot);
}

/** The lines that no other beats in both size and score, smallest first, as (size, score). */
function frontOf(lines, size, split) {
  const points = lines.map((line) => [line[size], line[split][0]]).sort((a, b) => a[0] - b[0] || b[1] - a[1]);
  let best = -Infinity;
  return points.filter(([, score]) => {
    const better = score > best;
    if (better) best = score;
    return better;
  });
}
