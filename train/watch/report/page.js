"use strict";
(() => {
  const data = JSON.parse(document.getElementById("page-data").textContent);
  const LEFT = 46, RIGHT = 8, TOP = 6, BOTTOM = 20, HEIGHT = 190;
  const DASHES = ["", "5 3", "1.5 3", "8 3 1.5 3"];
  const tip = document.getElementById("tip");
  const view = { axis: "steps", range: null };
  const plots = [];

  // Numbers as people read them: four digits, k and M above, exponents far below.
  function short(value, digits = 4) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size === 0) return "0";
    for (const [limit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "k"]])
      if (size >= limit) return trim((value / (limit === 1e4 ? 1e3 : limit)).toPrecision(digits)) + letter;
    if (size < 1e-3) {
      const [front, power] = value.toExponential(Math.max(0, digits - 2)).split("e");
      return trim(front) + "e" + Number(power);
    }
    return trim(value.toPrecision(digits));
  }
  // A number of a figure: shares as percentages.
  const told = (figure, value, digits = 4) =>
    figure.unit === "share" && value !== null ? trim((100 * value).toPrecision(digits)) + " %" : short(value, digits);
  // Ticks with their labels, in as many digits as tell them apart.
  function labelled(figure, ticks) {
    let labels = [];
    for (let digits = 4; digits < 10; digits++) {
      labels = ticks.map((tick) => told(figure, tick, digits));
      if (new Set(labels).size === ticks.length) break;
    }
    return ticks.map((tick, k) => [tick, labels[k]]);
  }
  const trim = (text) => (text.includes(".") ? text.replace(/0+$/, "").replace(/\.$/, "") : text);
  const whole = (value) => Math.round(value).toLocaleString("en-US");

  function niceTicks(low, high, wanted) {
    const raw = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((one) => one * power).find((one) => one >= raw * 0.999);
    const ticks = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high * (1 + 1e-12) + step * 1e-9; k++) ticks.push(k * step);
    return ticks;
  }
  function logTicks(low, high) {
    const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
    const fronts = last - first > 3 ? [1] : last - first > 1 ? [1, 3] : [1, 2, 3, 5];
    const every = Math.ceil((last - first) / 6);
    const ticks = [];
    for (let power = first; power <= last; power++)
      for (const front of fronts)
        if ((power - first) % every === 0 && front * 10 ** power >= low && front * 10 ** power <= high) ticks.push(front * 10 ** power);
    return ticks;
  }

  const SVG = "http://www.w3.org/2000/svg";
  function draw(parent, kind, attributes, text) {
    const node = document.createElementNS(SVG, kind);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  }
  function add(parent, kind, name, text) {
    const node = document.createElement(kind);
    if (name) node.className = name;
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  }
  const colour = (number) => `var(--c${number % 8})`;

  // Where the stretches of a run lie on the axis that is chosen.
  const places = (run) => data.runs[run][view.axis] || data.runs[run].steps;
  function wholeRange() {
    let low = Infinity, high = -Infinity;
    data.runs.forEach((run, number) => {
      const xs = places(number);
      if (xs.length) { low = Math.min(low, xs[0]); high = Math.max(high, xs[xs.length - 1]); }
    });
    return high > low ? [low, high] : [low - 1, low + 1];
  }
  const range = () => view.range || wholeRange();
  // The largest place whose value is at most x, in a sorted list.
  function before(xs, x) {
    let low = 0, high = xs.length;
    while (low < high) { const middle = (low + high) >> 1; if (xs[middle] <= x) low = middle + 1; else high = middle; }
    return low - 1;
  }
  function nearest(xs, x) {
    const left = Math.max(0, before(xs, x)), right = Math.min(xs.length - 1, left + 1);
    return Math.abs(xs[left] - x) <= Math.abs(xs[right] - x) ? left : right;
  }

  function frame(plot, height, xTicks, yTicks, x, y, names) {
    const svg = plot.svg, right = plot.width - RIGHT, bottom = height - BOTTOM;
    for (const [value, text] of yTicks) {
      if (!names) draw(svg, "line", { class: "grid", x1: LEFT, x2: right, y1: y(value), y2: y(value) });
      draw(svg, "text", { x: LEFT - 6, y: y(value) + 3.5, "text-anchor": "end" }, text);
    }
    draw(svg, "line", { class: "axis", x1: LEFT, x2: right, y1: bottom + 0.5, y2: bottom + 0.5 });
    xTicks.forEach((value) => {
      const at = x(value), side = at > right - 14 ? "end" : at < LEFT + 6 ? "start" : "middle";
      draw(svg, "line", { class: "axis", x1: at, x2: at, y1: bottom, y2: bottom + 4 });
      draw(svg, "text", { x: side === "end" ? Math.min(at + 12, plot.width) : at, y: bottom + 15, "text-anchor": side }, short(value));
    });
  }
  function stepTicks(low, high, width) {
    const ticks = niceTicks(low, high, Math.max(3, Math.floor((width - LEFT) / 46)));
    return view.axis === "steps" ? ticks.filter((tick) => Number.isInteger(tick)) : ticks;
  }
  const scale = (low, high, from, to) => (value) => from + ((value - low) / (high - low || 1)) * (to - from);

  // The values that a figure of curves spans: all means, and their bands as far as these do not dwarf them.
  // What a long curve begins with counts only where it does not dwarf the rest.
  function span(figure, low, high) {
    const settled = low + 0.04 * (high - low), all = spanFrom(figure, low, high, low), later = spanFrom(figure, low, high, settled);
    const long = figure.lines.some((line) => data.runs[line.run].series[line.name].i.length > 25);
    return long && !figure.log && all[1] - later[1] > 1.2 * (later[1] - later[0]) ? [...later, all[1]] : all;
  }
  function spanFrom(figure, low, high, from) {
    let least = Infinity, largest = -Infinity, under = Infinity, over = -Infinity;
    for (const line of figure.lines) {
      const series = data.runs[line.run].series[line.name], xs = places(line.run);
      series.i.forEach((place, k) => {
        if (xs[place] < from || xs[place] > high || (figure.log && series.y[k] <= 0)) return;
        least = Math.min(least, series.y[k]); largest = Math.max(largest, series.y[k]);
        const bottom = series.lo ? series.lo[k] : series.y[k], top = series.hi ? series.hi[k] : series.y[k];
        if (!(figure.log && bottom <= 0)) under = Math.min(under, bottom);
        over = Math.max(over, top);
      });
    }
    if (!(largest >= least)) return [0, 1];
    if (figure.log) return [Math.min(under, least) * 0.9, over * 1.1];
    const room = largest - least || Math.abs(largest) * 0.05 || 1;
    under = Math.max(under, least - room); over = Math.min(over, largest + room);
    const pad = (over - under || room) * 0.06;
    const floor = under >= 0 && under < 0.35 * over ? 0 : under - pad;
    return [under >= 0 ? Math.max(0, floor) : floor, over + pad];
  }

  function drawCurves(plot) {
    const figure = plot.figure, [low, high] = range(), height = HEIGHT;
    const svg = plot.svg;
    const [least, largest, beyond] = span(figure, low, high), width = plot.width;
    const x = scale(low, high, LEFT, width - RIGHT);
    const y = figure.log
      ? ((inner) => (value) => inner(Math.log10(Math.max(value, least / 10))))(scale(Math.log10(least), Math.log10(largest), height - BOTTOM, TOP))
      : scale(least, largest, height - BOTTOM, TOP);
    const powers = figure.log ? logTicks(least, largest) : [];
    const ticks = labelled(figure, powers.length > 1 ? powers : niceTicks(least, largest, 4));
    frame(plot, height, stepTicks(low, high, width), ticks, x, y);
    const clip = draw(svg, "clipPath", { id: `${plot.id}-clip` });
    draw(clip, "rect", { x: LEFT - 3, y: 0, width: Math.max(0, width - LEFT - RIGHT + 6), height: height - BOTTOM + 3 });
    const inside = draw(svg, "g", { "clip-path": `url(#${plot.id}-clip)` });
    drawMarks(inside, figure, x, height);
    const bands = draw(inside, "g", {});
    for (const line of figure.lines) {
      const series = data.runs[line.run].series[line.name], xs = places(line.run);
      const at = series.i.map((place) => x(xs[place]).toFixed(1));
      const drawable = series.i.map((_, k) => !(figure.log && series.y[k] <= 0));
      const path = series.y.map((value, k) => (drawable[k] ? `${at[k]},${y(value).toFixed(1)}` : "")).filter(Boolean);
      if (series.lo) {
        const over = series.hi.map((value, k) => `${at[k]},${y(value).toFixed(1)}`);
        const under = series.lo.map((value, k) => `${at[k]},${y(value).toFixed(1)}`).reverse();
        draw(bands, "path", { class: "band", d: `M${over.concat(under).join("L")}Z`, fill: colour(line.colour) });
      }
      draw(inside, "path", { class: "curve", d: `M${path.join("L")}`, stroke: colour(line.colour), "stroke-dasharray": DASHES[line.dash] });
      if (path.length <= 16)
        for (const point of path) {
          const [cx, cy] = point.split(",");
          draw(inside, "circle", { cx, cy, r: 2.4, fill: colour(line.colour) });
        }
    }
    if (beyond) draw(svg, "text", { class: "beyond", x: LEFT + 18, y: TOP + 9 }, `\u2191 from ${told(figure, beyond)}`);
    plot.x = x;
    plot.inverse = scale(LEFT, width - RIGHT, low, high);
    plot.y = y;
  }

  // Restarts and bad steps of the runs that a figure shows.
  function drawMarks(parent, figure, x, height) {
    new Set(figure.lines.map((line) => line.run)).forEach((run) => {
      for (const [step, kind, text] of data.runs[run].marks) {
        const at = x(places(run)[Math.max(0, before(data.runs[run].steps, step))]);
        const line = draw(parent, "line", { class: kind === "start" ? "mark" : "mark bad", x1: at, x2: at, y1: TOP, y2: height - BOTTOM });
        draw(line, "title", {}, text);
      }
    });
  }

  // Colours of a ramp as the theme has them now.
  function ramp(name) {
    const probe = add(document.body, "i");
    const stops = [0, 1, 2, 3, 4].map((number) => {
      probe.style.color = `var(--${name}${number})`;
      return getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
    });
    probe.remove();
    return (share) => {
      const at = Math.min(0.9999, Math.max(0, share)) * 4, left = Math.floor(at), part = at - left;
      return stops[left].map((from, k) => Math.round(from + (stops[left + 1][k] - from) * part));
    };
  }
  function extent(maps) {
    let low = Infinity, high = -Infinity;
    for (const map of maps) for (const row of map.values) for (const value of row)
      if (value !== null) { low = Math.min(low, value); high = Math.max(high, value); }
    return [low, high];
  }
  const LOADS = 3; // loads from an eighth to eight times an even share
  function shade(figure) {
    if (figure.even) {
      const colours = ramp("d");
      return (value) => colours(value <= 0 ? 0 : (Math.log2(value) + LOADS) / (2 * LOADS));
    }
    const [low, high] = extent(figure.maps), colours = ramp("r");
    return (value) => colours(high > low ? (value - low) / (high - low) : 0.5);
  }

  function drawMap(plot) {
    const { figure, map, svg, canvas, width } = plot, rows = map.rows.length;
    const height = plot.height, plotHeight = height - TOP - BOTTOM, plotWidth = Math.max(1, Math.floor(width - LEFT - RIGHT));
    const overSteps = figure.view === "layers";
    const [low, high] = overSteps ? range() : [0, map.values[0].length];
    const xs = overSteps ? map.columns.map((place) => places(map.run)[place]) : map.values[0].map((_, k) => k + 1);
    const inverse = scale(0, plotWidth, low, high), colours = shade(figure);
    canvas.width = plotWidth; canvas.height = rows;
    Object.assign(canvas.style, { left: `${LEFT}px`, top: `${TOP}px`, width: `${plotWidth}px`, height: `${plotHeight}px`, imageRendering: "pixelated" });
    const context = canvas.getContext("2d"), image = context.createImageData(plotWidth, rows);
    for (let px = 0; px < plotWidth; px++) {
      const column = columnAt(xs, inverse(px + 0.5), overSteps);
      for (let row = 0; row < rows; row++) {
        const value = column === null ? null : map.values[row][column];
        if (value === null || value === undefined) continue;
        image.data.set([...colours(value), 255], 4 * (row * plotWidth + px));
      }
    }
    context.putImageData(image, 0, 0);
    const each = plotHeight / rows, every = Math.max(1, Math.ceil(13 / each));
    const labels = map.rows.map((name, row) => [row, name]).filter(([row]) => row % every === 0 || (row === rows - 1 && (row % every) * each > 12));
    const x = scale(low, high, LEFT, LEFT + plotWidth);
    const ticks = overSteps ? stepTicks(low, high, width) : niceTicks(0, high, Math.max(2, Math.floor(width / 80))).filter(Number.isInteger);
    frame(plot, height, ticks, labels.map(([row, name]) => [row, name]), x, (row) => TOP + (row + 0.5) * each, true);
    plot.x = overSteps ? x : null;
    plot.inverse = scale(LEFT, LEFT + plotWidth, low, high);
    plot.cell = (px, py) => {
      const at = plot.inverse(px), column = columnAt(xs, at, overSteps), row = Math.floor((py - TOP) / each);
      if (column === null || row < 0 || row >= rows) return null;
      return { row: map.rows[row], column: overSteps ? xs[column] : column, value: map.values[row][column] };
    };
  }
  // The column of a map that x lies in: stretches of steps end at their places.
  function columnAt(xs, x, overSteps) {
    if (!overSteps) return Math.min(xs.length - 1, Math.max(0, Math.floor(x)));
    const column = before(xs, x - 1e-9) + 1;
    return column < xs.length ? column : x <= xs[xs.length - 1] * 1.0001 ? xs.length - 1 : null;
  }

  // What stands beside a figure: legends and scales of colour.
  function legend(plot) {
    const figure = plot.figure;
    if (figure.lines.length < 2) return;
    const told = figure.lines.some((line) => line.says), box = add(plot.home, "div", told ? "legend told" : "legend");
    plot.home.insertBefore(box, plot.home.querySelector(".gap"));
    for (const line of legendLines(figure)) {
      const item = add(box, "span"), swatch = draw(item, "svg", { viewBox: "0 0 18 8" });
      draw(swatch, "line", { x1: 0, x2: 18, y1: 5, y2: 5, stroke: line.colour < 0 ? "var(--muted)" : colour(line.colour), "stroke-width": 2, "stroke-dasharray": DASHES[line.dash] });
      if (!told) { item.append(line.label); continue; }
      add(item, "b", "", line.label);
      item.append(` ${line.says}`);
    }
  }
  // Colours of runs and dashes of metrics, where there are several of both; else each line.
  function legendLines(figure) {
    const metrics = new Map(figure.lines.map((line) => [line.metric, line.dash]));
    if (data.runs.length < 2 || metrics.size < 2) return figure.lines;
    const runs = [...new Set(figure.lines.map((line) => line.run))];
    return [
      ...runs.map((run) => ({ colour: run, dash: 0, label: data.runs[run].name })),
      ...[...metrics].map(([label, dash]) => ({ colour: -1, dash, label })),
    ];
  }
  function colourScale(home, figure) {
    const box = document.createElement("div"), [low, high] = extent(figure.maps);
    box.className = "scale";
    home.insertBefore(box, home.querySelector(".gap"));
    add(box, "span", "", figure.even ? "none" : short(low));
    const canvas = add(box, "canvas");
    canvas.width = 100; canvas.height = 1;
    add(box, "span", "", figure.even ? "8 × an even share" : short(high));
    return () => {
      const colours = ramp(figure.even ? "d" : "r"), context = canvas.getContext("2d"), image = context.createImageData(100, 1);
      for (let k = 0; k < 100; k++) image.data.set([...colours(k / 99), 255], 4 * k);
      context.putImageData(image, 0, 0);
    };
  }

  function build(figure) {
    const home = document.getElementById(figure.id);
    add(home, "div", "gap");
    if (figure.view === "curves") return plots.push(boxed(home, figure, null));
    const repaint = colourScale(home, figure), own = [], cells = add(home, "div", "cells");
    if (figure.maps.length > 2) home.classList.add("wide");
    for (const map of figure.maps) {
      const which = [data.runs.length > 1 ? data.runs[map.run].name : "", map.part].filter(Boolean).join(", ");
      const cell = add(cells, "div");
      if (which) add(cell, "div", "which", which);
      own.push(boxed(home, figure, map, cell));
    }
    own[0].repaint = repaint;
    plots.push(...own);
  }
  function boxed(home, figure, map, place = home) {
    const box = add(place, "div", "plot"), svg = draw(box, "svg", { role: "img", "aria-label": figure.title });
    const plot = { id: `${figure.id}-${plots.length}`, home, box, svg, figure, map, height: HEIGHT };
    if (map) {
      plot.canvas = add(box, "canvas");
      const least = figure.maps.length > 2 ? 90 : HEIGHT; // of several maps under each other
      plot.height = Math.max(least, Math.min(figure.maps.length > 2 ? 160 : 320, map.rows.length * 6 + TOP + BOTTOM));
    } else legend(plot);
    listen(plot);
    return plot;
  }
  function render() {
    for (const plot of plots) {
      plot.width = plot.box.clientWidth;
      plot.svg.replaceChildren();
      plot.svg.setAttribute("viewBox", `0 0 ${plot.width} ${plot.height}`);
      plot.svg.setAttribute("height", plot.height);
      if (plot.map) drawMap(plot); else drawCurves(plot);
      if (plot.repaint) plot.repaint();
      plot.cross = draw(plot.svg, "g", {});
    }
    document.documentElement.dataset.drawn = plots.length;
  }

  // The pointer: values of one figure, and a line at the same place in all.
  function listen(plot) {
    const at = (event) => { const box = plot.box.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
    let begin = null;
    plot.box.addEventListener("pointermove", (event) => {
      const [px, py] = at(event);
      if (begin !== null) pick(plot, begin, px);
      hover(plot, px, py, event);
    });
    plot.box.addEventListener("pointerdown", (event) => {
      hover(plot, ...at(event), event);
      if (event.pointerType === "mouse" && event.button === 0 && plot.x) { begin = at(event)[0]; plot.box.setPointerCapture(event.pointerId); event.preventDefault(); }
    });
    plot.box.addEventListener("pointerup", (event) => {
      const end = at(event)[0];
      if (begin !== null && Math.abs(end - begin) > 8) {
        const limits = wholeRange(), chosen = [begin, end].map(plot.inverse).sort((a, b) => a - b);
        view.range = [Math.max(limits[0], chosen[0]), Math.min(limits[1], chosen[1])];
        render();
      }
      begin = null;
    });
    plot.box.addEventListener("dblclick", () => { view.range = null; render(); });
    plot.box.addEventListener("pointerleave", () => { if (begin === null) leave(); });
  }
  function pick(plot, from, to) {
    plot.svg.querySelectorAll(".pick").forEach((node) => node.remove());
    draw(plot.svg, "rect", { class: "pick", x: Math.min(from, to), width: Math.abs(to - from), y: TOP, height: plot.height - TOP - BOTTOM });
  }
  function leave() {
    tip.hidden = true;
    for (const plot of plots) plot.cross.replaceChildren();
  }
  function hover(plot, px, py, event) {
    if (px < LEFT - 4 || px > plot.width) return leave();
    const value = plot.inverse(Math.min(Math.max(px, LEFT), plot.width - RIGHT));
    for (const other of plots) {
      other.cross.replaceChildren();
      if (!plot.x || !other.x) continue;
      const x = other.x(value);
      draw(other.cross, "line", { class: "cross", x1: x, x2: x, y1: TOP, y2: other.height - BOTTOM });
    }
    tip.replaceChildren();
    if (plot.map) tellCell(plot, px, py); else tellCurves(plot, value);
    tip.hidden = !tip.childNodes.length;
    const box = tip.getBoundingClientRect(), right = event.clientX + 14;
    tip.style.left = `${right + box.width > innerWidth - 6 ? Math.max(6, event.clientX - 14 - box.width) : right}px`;
    tip.style.top = `${Math.max(6, Math.min(event.clientY + 12, innerHeight - box.height - 6))}px`;
  }
  function tellCell(plot, px, py) {
    const cell = plot.cell(px, py);
    if (!cell) return;
    const where = plot.figure.view === "layers" ? `${view.axis === "steps" ? "step" : "tokens"} ${whole(cell.column)}` : `expert ${cell.column}`;
    add(tip, "div", "at", `layer ${cell.row}, ${where}`);
    add(tip, "div", "", plot.figure.unit === "share" ? told(plot.figure, cell.value) : `${short(cell.value)} ${plot.figure.unit}`);
  }
  function tellCurves(plot, value) {
    const table = document.createElement("table"), tokens = view.axis === "tokens";
    let shown = null;
    for (const line of plot.figure.lines) {
      const run = data.runs[line.run], series = run.series[line.name], xs = places(line.run), own = series.i.map((place) => xs[place]);
      const k = nearest(own, value), row = add(table, "tr");
      if (!own.length) continue;
      shown = shown === null ? series.i[k] : shown;
      add(add(row, "td"), "i", "swatch").style.background = colour(line.colour);
      add(row, "td", "", line.label);
      add(row, "td", "number", told(plot.figure, series.y[k]));
      const wide = series.lo && series.lo[k] !== series.hi[k];
      add(row, "td", "at", wide ? `${told(plot.figure, series.lo[k])} to ${told(plot.figure, series.hi[k])}` : "");
      draw(plot.cross, "circle", { class: "here", cx: plot.x(own[k]), cy: plot.y(series.y[k]), r: 3.5, fill: colour(line.colour) });
    }
    const first = plot.figure.lines[0].run, run = data.runs[first];
    if (shown === null) return;
    const also = run.tokens ? `, ${short(run.tokens[shown])} tokens` : "";
    add(tip, "div", "at", `step ${whole(run.steps[shown])}${also}${tokens && data.runs.length > 1 ? ` of ${run.name}` : ""}`);
    tip.append(table);
  }

  const axis = document.getElementById("axis"), theme = document.getElementById("theme");
  if (data.runs.every((run) => run.tokens) && plots) {
    axis.hidden = false;
    axis.addEventListener("click", () => {
      view.axis = view.axis === "steps" ? "tokens" : "steps";
      axis.textContent = view.axis === "steps" ? "over tokens" : "over steps";
      view.range = null;
      leave(); render();
    });
  }
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";
  const label = () => { theme.textContent = isDark() ? "light" : "dark"; };
  theme.hidden = false;
  theme.addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; label(); render(); });
  dark.addEventListener("change", () => { label(); render(); });
  label();
  data.figures.forEach(build);
  render();
  let asked = 0, width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return; // a phone's bars that come and go
    width = innerWidth;
    cancelAnimationFrame(asked);
    asked = requestAnimationFrame(render);
  });
})();
