"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  // by module name: a name may be "constructor" or "__proto__", which every object has
  const distributions = new Map(Object.entries(data.distributions));
  const $ = (id) => document.getElementById(id);
  const root = document.documentElement;
  const candidates = data.recipes.slice(1); // recipe 0 is exact
  const single = data.columns.length === 1;
  const MINUS = "−";
  const METRICS = {
    score: { label: "CosSim · (1 − L1)", error: (v) => 1 - v, value: (e) => 1 - e },
    l1: { label: "relative L1", error: (v) => v, value: (e) => e },
    cos_sim: { label: "CosSim", error: (v) => 1 - v, value: (e) => 1 - e },
    rmse: { label: "RMSE", error: (v) => v, value: (e) => e },
  };
  // exact is grey, 8 bits are cold, 4 bits are warm
  const COLD = ["#2f6fde", "#13a089", "#7c5ce0", "#59a8f5", "#0d7f56", "#9aa3f7"];
  const WARM = ["#e0731d", "#d43f8d", "#b98c00", "#f29a8e", "#9c3d1a", "#e3b04b"];
  const colours = (() => {
    let cold = 0, warm = 0;
    return data.recipes.map((r, i) => (i === 0 ? "#8b8f96" : r.bits === 4 ? WARM[warm++ % 6] : COLD[cold++ % 6]));
  })();
  const state = { recipe: worstRecipe(), metric: "score", sort: "model", overlay: true, layer: 0, stages: {}, order: { column: "error", down: true } };

  function worstRecipe() {
    const four = candidates.findIndex((r) => r.bits === 4);
    return four < 0 ? 0 : four;
  }
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const show = (v, digits = 4) => (v === null || v === undefined ? "–" : Math.abs(v) >= 1e-3 || v === 0 ? v.toFixed(digits).replace("-", MINUS) : v.toExponential(1).replace("-", MINUS));
  const step = (t) => String(Math.abs(t) >= 100 ? Math.round(t) : Number(t.toPrecision(3))).replace("-", MINUS);
  // what all names share at either end is said once, above the rows
  const short = (() => {
    const parts = data.rows.map((r) => r.split("."));
    const least = Math.min(...parts.map((p) => p.length));
    let head = 0, tail = 0;
    if (parts.length > 1) {
      while (head < least - 1 && parts.every((p) => p[head] === parts[0][head])) head++;
      while (tail < least - 1 - head && parts.every((p) => p[p.length - 1 - tail] === parts[0][parts[0].length - 1 - tail])) tail++;
    }
    const pattern = [...parts[0].slice(0, head), "*", ...(tail ? parts[0].slice(-tail) : [])].join(".");
    return { pattern: head + tail ? pattern : "", rows: parts.map((p) => p.slice(head, p.length - tail).join(".")) };
  })();

  function element(parent, name, attributes = {}, text) {
    const svg = parent instanceof SVGElement || name === "svg";
    const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  }
  const clear = (node) => { node.replaceChildren(); return node; };

  // ---- colours of the heat map: the error on a logarithmic scale between its extremes
  function rgb(hex) {
    return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  }
  function ramp(share) {
    const stops = ["--heat-0", "--heat-1", "--heat-2", "--heat-3"].map((n) => rgb(css(n)));
    const at = Math.min(Math.max(share, 0), 1) * 3;
    const low = Math.min(2, Math.floor(at));
    return "rgb(" + stops[low].map((v, i) => Math.round(v + (stops[low + 1][i] - v) * (at - low))).join(",") + ")";
  }
  function value(cell, recipe) {
    return cell === null ? null : cell.scores[recipe][data.metrics.indexOf(state.metric)];
  }
  const rank = (v) => (v === null ? -1 : METRICS[state.metric].error(v));
  function range() {
    const errors = [];
    for (const row of data.cells) for (const cell of row) for (let r = 0; r < candidates.length; r++) {
      const v = value(cell, r);
      if (v !== null) errors.push(Math.max(METRICS[state.metric].error(v), 1e-7));
    }
    if (!errors.length) return [1e-3, 1];
    let low = Infinity, high = 0;
    for (const e of errors) { low = Math.min(low, e); high = Math.max(high, e); }
    return high > low * 1.05 ? [low, high] : [low / 2, high * 2];
  }
  const share = (v, [low, high]) => Math.log(Math.max(METRICS[state.metric].error(v), low) / low) / Math.log(high / low);

  function rowOrder() {
    const rows = data.rows.map((_, i) => i);
    if (state.sort === "name") rows.sort((a, b) => data.rows[a].localeCompare(data.rows[b], "en", { numeric: true }));
    if (state.sort === "worst") {
      const worst = rows.map((i) => Math.max(...data.cells[i].map((c) => rank(value(c, state.recipe)))));
      rows.sort((a, b) => worst[b] - worst[a] || a - b);
    }
    return rows;
  }

  // ---- the heat map: layers × timesteps of one recipe, or layers × recipes where there is one timestep
  function drawHeat() {
    const svg = clear($("heat"));
    const rows = rowOrder(), extremes = range();
    const columns = single ? candidates.map((r, i) => ({ label: r.name, recipe: i, at: 0 }))
      : data.columns.map((t, i) => ({ label: step(t), recipe: state.recipe, at: i }));
    const longest = Math.max(...short.rows.map((r) => r.length));
    const left = Math.min(300, Math.max(single ? 20 : 74, 16 + longest * 6.9)), top = 24;
    const room = Math.max(320, $("heat").parentElement.clientWidth - left - 6);
    const width = Math.max(single ? 96 : 13, Math.min(single ? 250 : 72, room / columns.length));
    const height = Math.max(15, Math.min(28, 640 / rows.length));
    svg.setAttribute("width", left + columns.length * width + 4);
    svg.setAttribute("height", top + rows.length * height + 4);
    if (!single) element(svg, "text", { x: left - 8, y: top - 7, "text-anchor": "end", class: "strong" }, "timestep");
    const skip = single ? 1 : Math.max(1, Math.ceil(38 / width));
    columns.forEach((c, i) => {
      if (i % skip) return;
      element(svg, "text", { x: left + (i + 0.5) * width, y: top - 7, "text-anchor": "middle", class: "column" }, c.label);
    });
    rows.forEach((r, y) => {
      const full = short.rows[r], fit = Math.floor((left - 14) / 6.9);
      const label = element(svg, "text", { x: left - 8, y: top + (y + 0.5) * height + 4, "text-anchor": "end", class: "row" },
        full.length > fit ? "…" + full.slice(1 - fit) : full);
      element(label, "title", {}, data.rows[r]);
      columns.forEach((c, x) => {
        const cell = data.cells[r][c.at], v = value(cell, c.recipe);
        if (v === null) return;
        const group = element(svg, "g", { class: "cell", "data-row": r, "data-column": x });
        const s = share(v, extremes);
        element(group, "rect", { x: left + x * width + 0.5, y: top + y * height + 0.5, width: width - 1, height: height - 1, rx: 2, fill: ramp(s) });
        const cx = left + (x + 0.5) * width, cy = top + (y + 0.5) * height;
        if (single && width >= 90) {
          const dark = root.dataset.theme === "dark";
          element(group, "text", { x: cx, y: cy + 4, "text-anchor": "middle", style: "fill:" + ((dark ? s > 0.75 : s < 0.55) ? "#1b1c1e" : "#f4f1ea") }, show(v));
        }
        if (state.overlay && cell.recipe !== null && (!single || cell.recipe === c.recipe + 1 || (cell.recipe === 0 && x === 0))) {
          const dx = single ? left + x * width + 14 : cx;
          element(group, "circle", { class: "chosen", cx: dx, cy, r: Math.min(5, Math.min(width, height) * 0.27), fill: colours[cell.recipe], stroke: css("--card"), "stroke-width": 1.5 });
        }
        group.addEventListener("mousemove", (event) => tip(event, callText(r, c.at)));
        group.addEventListener("mouseleave", hideTip);
        group.addEventListener("click", () => pickLayer(r));
      });
    });
    const m = METRICS[state.metric];
    $("heat-hint").textContent = (single ? "One timestep, so each column is a recipe. " : "Shown is " + candidates[state.recipe].name + ": " + candidates[state.recipe].summary + ". ")
      + "Colour: " + m.label + (state.overlay ? ". Dots: the recipe that the policy runs there." : ".")
      + (short.pattern ? " Rows: " + short.pattern + "." : "");
    const scale = clear($("scale"));
    element(scale, "span", {}, "best " + show(m.value(extremes[0])));
    element(scale, "i", { style: "background:linear-gradient(90deg," + [0, 1, 2, 3].map((i) => css("--heat-" + i)).join(",") + ")" });
    element(scale, "span", {}, show(m.value(extremes[1])) + " worst");
    const legend = clear($("legend"));
    if (state.overlay) data.recipes.forEach((r, i) => {
      if (r.share) element(legend, "span", { style: "--c:" + colours[i] }, r.name + " " + Math.round(100 * r.share) + " %");
    });
  }
  function callText(r, c) {
    const cell = data.cells[r][c];
    const lines = [data.rows[r] + (single ? "" : ", timestep " + step(data.columns[c])), cell.shape + ", seen " + cell.count + "×"];
    candidates.forEach((recipe, i) => {
      const [score, l1, cos] = cell.scores[i];
      lines.push((cell.recipe === i + 1 ? "● " : "○ ") + recipe.name + ": score " + show(score) + ", L1 " + show(l1) + ", CosSim " + show(cos));
    });
    if (cell.recipe === 0) lines.push("● exact");
    return lines.join("\n");
  }

  // ---- error against time
  function ticks(low, high, count) {
    const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
    const size = [1, 2, 5, 10].map((k) => k * power).find((s) => s >= raw);
    const found = [];
    for (let t = Math.ceil(low / size) * size; t <= high + size * 1e-6; t += size) found.push(Number(t.toPrecision(6)));
    return found;
  }
  function drawPareto() {
    const svg = clear($("pareto")), p = data.pareto;
    const width = Math.max(320, svg.parentElement.clientWidth - 40), height = 372;
    const box = { left: 62, right: 18, top: 14, bottom: 44 };
    svg.setAttribute("width", width); svg.setAttribute("height", height);
    const points = [...p.curve, ...p.alone, p.chosen].filter((q) => q.x !== null && q.y !== null);
    if (!points.length) { $("pareto-hint").textContent = "No modelled time is known for these recipes."; return; }
    $("pareto-hint").textContent = "Times are modelled by " + p.cost + ". The line is the best that can be had; a policy of one recipe for all is a circle.";
    const xMax = Math.max(...points.map((q) => q.x)) * 1.04, yMax = Math.max(...points.map((q) => q.y)) * 1.08 || 1;
    const xMin = Math.min(...points.map((q) => q.x)) * 0.9;
    const X = (v) => box.left + ((v - xMin) / (xMax - xMin)) * (width - box.left - box.right);
    const Y = (v) => height - box.bottom - (v / yMax) * (height - box.top - box.bottom);
    for (const t of ticks(xMin, xMax, 5)) {
      element(svg, "line", { class: "axis", x1: X(t), x2: X(t), y1: box.top, y2: height - box.bottom });
      element(svg, "text", { x: X(t), y: height - box.bottom + 17, "text-anchor": "middle" }, String(t));
    }
    for (const t of ticks(0, yMax, 6)) {
      element(svg, "line", { class: "axis", x1: box.left, x2: width - box.right, y1: Y(t), y2: Y(t) });
      element(svg, "text", { x: box.left - 8, y: Y(t) + 4, "text-anchor": "end" }, String(t));
    }
    element(svg, "text", { x: (box.left + width - box.right) / 2, y: height - 8, "text-anchor": "middle", class: "strong" }, "modelled time of attention, " + data.pareto.unit);
    element(svg, "text", { transform: "translate(14," + (height - box.bottom) / 2 + ") rotate(-90)", "text-anchor": "middle", class: "strong" }, "mean error (" + p.metric + ")");
    const line = p.curve.map((q) => X(q.x) + "," + Y(q.y)).join(" ");
    element(svg, "polyline", { points: line, fill: "none", stroke: css("--accent"), "stroke-width": 2, "stroke-linejoin": "round" });
    const shares = (q) => Object.entries(q.share).map(([n, s]) => Math.round(100 * s) + " % " + n).join("\n");
    const hover = (node, text) => {
      node.addEventListener("mousemove", (event) => tip(event, text));
      node.addEventListener("mouseleave", hideTip);
    };
    for (const q of p.curve) hover(element(svg, "circle", { class: "best", cx: X(q.x), cy: Y(q.y), r: 3.2, fill: css("--accent") }), show(q.x, 2) + " " + data.pareto.unit + ", error " + show(q.y) + "\n" + shares(q));
    // the labels: each on the side and at the height where it lies on no other
    const taken = [];
    const place = (text, x, y, strong) => {
      const w = text.length * 6.8 + 4;
      const spots = [[9, 4, "start"], [-9, 4, "end"], [9, -9, "start"], [-9, -9, "end"], [9, 17, "start"], [-9, 17, "end"], [9, 30, "start"], [-9, -22, "end"], [9, -22, "start"], [-9, 30, "end"]];
      for (const [dx, dy, anchor] of spots) {
        const x0 = anchor === "start" ? x + dx : x + dx - w, y0 = y + dy - 11;
        const free = x0 > box.left && x0 + w < width && y0 > 0 && y0 + 13 < height - box.bottom &&
          !taken.some((t) => x0 < t.x + t.w && x0 + w > t.x && y0 < t.y + 13 && y0 + 13 > t.y);
        if (!free) continue;
        taken.push({ x: x0, y: y0, w });
        element(svg, "text", { x: x + dx, y: y + dy, "text-anchor": anchor, class: strong ? "strong" : "", style: "paint-order:stroke;stroke:" + css("--card") + ";stroke-width:3px" }, text);
        return;
      }
    };
    p.alone.forEach((q) => { if (q.x !== null && q.y !== null) taken.push({ x: X(q.x) - 6, y: Y(q.y) - 6.5, w: 12 }); });
    if (p.chosen.x !== null && p.chosen.y !== null) {
      const x = X(p.chosen.x), y = Y(p.chosen.y);
      const mark = element(svg, "path", { class: "mark", d: `M${x} ${y - 9}L${x + 9} ${y}L${x} ${y + 9}L${x - 9} ${y}Z`, fill: css("--ink"), stroke: css("--card"), "stroke-width": 2 });
      hover(mark, "the policy: " + show(p.chosen.x, 2) + " " + data.pareto.unit + ", error " + show(p.chosen.y) + "\n" + shares(p.chosen));
      place("this policy", x, y, true);
    }
    for (const q of p.alone) {
      if (q.x === null || q.y === null) continue;
      const i = data.recipes.findIndex((r) => r.name === q.name);
      hover(element(svg, "circle", { class: "alone", cx: X(q.x), cy: Y(q.y), r: 5.5, fill: css("--card"), stroke: colours[i], "stroke-width": 2.5 }), "all " + q.name + ": " + show(q.x, 2) + " " + data.pareto.unit + ", error " + show(q.y));
      place(q.name, X(q.x), Y(q.y), false);
    }
  }

  // ---- the worst calls
  const l1At = data.metrics.indexOf("l1");
  const calls = [];
  data.cells.forEach((row, r) => row.forEach((cell, c) => {
    if (cell === null) return;
    const d = distributions.get(data.names[r]);
    const peak = (stage) => (d && d.k && d.k[stage] ? d.k[stage].crest : null);
    calls.push({ row: r, column: c, layer: data.rows[r], timestep: data.columns[c], cell,
      error: cell.recipe ? cell.scores[cell.recipe - 1][l1At] : cell.recipe === 0 ? 0 : null, peak: peak("raw"), rotated: peak("rotated") });
  }));
  const COLUMNS = [
    ["layer", "layer", (c) => short.rows[c.row]],
    ...(single ? [] : [["timestep", "timestep", (c) => step(c.timestep)]]),
    ["runs", "runs", (c) => (c.cell.recipe === null ? "–" : data.recipes[c.cell.recipe].name)],
    ["error", "its L1", (c) => show(c.error)],
    ...candidates.map((r, i) => ["l1:" + i, r.name, (c) => show(c.cell.scores[i][l1At])]),
    ["peak", "K peak", (c) => show(c.peak, 2)],
    ["rotated", "after", (c) => show(c.rotated, 2)],
  ];
  function sortKey(c, column) {
    if (column === "layer") return c.row;
    if (column === "runs") return c.cell.recipe;
    if (column.startsWith("l1:")) return c.cell.scores[Number(column.slice(3))][l1At];
    return c[column];
  }
  function drawTable() {
    const head = clear($("worst").tHead), body = clear($("worst").tBodies[0]);
    const titles = element(head, "tr");
    for (const [column, title] of COLUMNS) {
      const on = state.order.column === column;
      const th = element(titles, "th", { "data-column": column, tabindex: 0, class: on ? "sorted" : "" }, title + (on ? (state.order.down ? " ↓" : " ↑") : ""));
      const sort = () => { state.order = { column, down: on ? !state.order.down : column !== "layer" }; drawTable(); };
      th.addEventListener("click", sort);
      th.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
    }
    const sign = state.order.down ? -1 : 1;
    const sorted = calls.map((c) => [sortKey(c, state.order.column) ?? -1, c]).sort((a, b) => sign * (a[0] - b[0])).map((pair) => pair[1]);
    for (const call of sorted.slice(0, 60)) {
      const line = element(body, "tr");
      COLUMNS.forEach(([column, , text]) => {
        const td = element(line, "td", {}, "");
        if (column === "runs" && call.cell.recipe !== null) element(td, "span", { class: "key", style: "--c:" + colours[call.cell.recipe] }, text(call));
        else td.textContent = text(call);
        if (column === "layer") td.title = call.layer;
      });
      line.addEventListener("click", () => pickLayer(call.row));
    }
  }

  // ---- distributions
  const STAGES = Object.keys(data.stages);
  STAGES.forEach((s) => { state.stages[s] = true; });
  function pickLayer(row) {
    state.layer = row;
    $("layer").value = String(row);
    drawTensors();
  }
  function drawTensors() {
    const place = clear($("tensors"));
    const found = distributions.get(data.names[state.layer]);
    if (!found) { element(place, "p", {}, "No distribution was recorded for this layer."); return; }
    for (const tensor of ["q", "k", "v"]) {
      const panel = element(place, "div");
      element(panel, "h3", {}, tensor.toUpperCase());
      const stages = STAGES.filter((s) => found[tensor][s] && state.stages[s]);
      element(panel, "p", {}, "peak " + (stages.map((s) => show(found[tensor][s].crest, 2) + " " + data.stages[s]).join(" → ") || "–"));
      if (stages.length) { histogram(panel, found[tensor], stages); channels(panel, found[tensor], stages); }
    }
  }
  function spanOf(d) {
    // what all but 1 in 5000 numbers lie within, and no less than the largest channels
    return Math.max(...d.channels, 1e-6);
  }
  function histogram(panel, stages, names) {
    const width = Math.max(230, panel.clientWidth), height = 150, base = height - 22;
    const svg = element(panel, "svg", { width, height, class: "histogram" });
    const span = Math.max(...names.map((s) => spanOf(stages[s]))) * 1.02, bins = 61;
    const X = (v) => 6 + ((v + span) / (2 * span)) * (width - 12);
    let peak = 0;
    const lines = names.map((s) => {
      const total = stages[s].counts.reduce((a, b) => a + b, 0), found = new Array(bins).fill(0);
      stages[s].counts.forEach((count, i) => { // shared out over the bins that it overlaps
        const from = data.edges[stages[s].first_bin + i], to = data.edges[stages[s].first_bin + i + 1];
        const a = Math.max(0, Math.floor(((from + span) / (2 * span)) * bins)), b = Math.min(bins - 1, Math.floor(((to + span) / (2 * span)) * bins));
        for (let j = a; j <= b; j++) {
          const low = Math.max(from, -span + (2 * span * j) / bins), high = Math.min(to, -span + (2 * span * (j + 1)) / bins);
          if (high > low) found[j] += (count / total) * ((high - low) / (to - from));
        }
      });
      peak = Math.max(peak, ...found);
      return found;
    });
    const floor = 1e-5, Y = (f) => base - (Math.log(Math.max(f, floor) / floor) / Math.log(peak / floor)) * (base - 6);
    lines.forEach((found, i) => {
      const at = found.map((f, j) => X(-span + (2 * span * (j + 0.5)) / bins) + "," + Y(f));
      const colour = css("--" + names[i]);
      element(svg, "polygon", { points: X(-span) + "," + base + " " + at.join(" ") + " " + X(span) + "," + base, fill: colour, "fill-opacity": 0.12 });
      element(svg, "polyline", { points: at.join(" "), fill: "none", stroke: colour, "stroke-width": 1.8, "stroke-linejoin": "round" });
    });
    element(svg, "line", { class: "axis", x1: 6, x2: width - 6, y1: base, y2: base });
    const values = ticks(-span, span, 5);
    for (const t of values) if (X(t) > 16 && X(t) < width - 16) element(svg, "text", { x: X(t), y: height - 6, "text-anchor": "middle" }, String(t).replace("-", MINUS));
  }
  function channels(panel, stages, names) {
    const width = Math.max(230, panel.clientWidth), height = 112, base = height - 20, left = 34;
    const svg = element(panel, "svg", { width, height, class: "channels" });
    const most = Math.max(...names.map((s) => Math.max(...stages[s].channels)), 1e-9), count = Math.max(...names.map((s) => stages[s].channels.length));
    const X = (c) => left + (c / Math.max(1, count - 1)) * (width - left - 8), Y = (v) => base - (v / most) * (base - 8);
    for (const t of ticks(0, most, 2)) {
      element(svg, "line", { class: "axis", x1: left, x2: width - 8, y1: Y(t), y2: Y(t) });
      element(svg, "text", { x: left - 5, y: Y(t) + 4, "text-anchor": "end" }, String(t));
    }
    names.forEach((s) => {
      const scale = (count - 1) / Math.max(1, stages[s].channels.length - 1);
      element(svg, "polyline", { points: stages[s].channels.map((v, c) => X(c * scale) + "," + Y(v)).join(" "), fill: "none", stroke: css("--" + s), "stroke-width": 1.4, "stroke-linejoin": "round" });
    });
    element(svg, "text", { x: left, y: height - 5 }, "channel 0");
    element(svg, "text", { x: width - 8, y: height - 5, "text-anchor": "end" }, String(count - 1));
  }

  // ---- the tip that follows the pointer
  function tip(event, text) {
    const box = $("tip");
    box.textContent = text;
    box.className = "on";
    const w = box.offsetWidth, h = box.offsetHeight;
    box.style.left = Math.min(event.clientX + 14, innerWidth - w - 8) + "px";
    box.style.top = (event.clientY + 18 + h > innerHeight ? event.clientY - h - 12 : event.clientY + 18) + "px";
  }
  function hideTip() { $("tip").className = ""; }

  // ---- controls
  function option(select, value, text) { element(select, "option", { value }, text); }
  candidates.forEach((r, i) => option($("recipe"), i, r.name));
  $("recipe").value = String(state.recipe);
  data.metrics.forEach((m) => option($("metric"), m, METRICS[m].label));
  data.rows.forEach((r, i) => option($("layer"), i, r));
  STAGES.forEach((s) => {
    const label = element($("stages"), "label");
    const box = element(label, "input", { type: "checkbox", "data-stage": s, style: "accent-color:var(--" + s + ")" });
    box.checked = true;
    element(label, "span", {}, data.stages[s]);
    box.addEventListener("change", () => { state.stages[s] = box.checked; drawTensors(); });
  });
  const on = (id, set) => $(id).addEventListener("change", () => { set($(id)); drawHeat(); });
  on("recipe", (node) => { state.recipe = Number(node.value); });
  on("metric", (node) => { state.metric = node.value; });
  on("sort", (node) => { state.sort = node.value; });
  on("overlay", (node) => { state.overlay = node.checked; });
  $("layer").addEventListener("change", () => pickLayer(Number($("layer").value)));
  if (single) $("recipe").parentElement.title = "what the rows are sorted by";

  for (const fact of data.facts) {
    const card = element($("facts"), "div", { class: "fact" });
    element(card, "b", {}, fact.value);
    element(card, "span", {}, fact.name);
    element(card, "small", {}, fact.detail);
  }
  for (const note of data.notes) element($("notes"), "li", {}, note);

  function drawAll() { drawHeat(); drawPareto(); drawTable(); drawTensors(); }
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const theme = (isDark) => { root.dataset.theme = isDark ? "dark" : "light"; drawAll(); };
  $("theme").addEventListener("click", () => theme(root.dataset.theme !== "dark"));
  dark.addEventListener("change", (event) => theme(event.matches));
  let waiting = 0;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(drawAll, 120); });
  theme(dark.matches);
  root.dataset.ready = "yes";
})();
