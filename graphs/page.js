"use strict";
(() => {
const began = performance.now();
const D = JSON.parse(document.getElementById("data").textContent);
const N = D.nodes, E = D.edges, n = N.id.length, m = E.s.length;
const $ = id => document.getElementById(id);
const NS = "http://www.w3.org/2000/svg";
const LEFT = 128, RIGHT = 26, TOP = 34, LABELS = 14, DEFAULT = 300, PAGE = 200, NARROWEST = 640;
// Of the drawing, in pixels: the lines' canvas and the nodes' picture share it, and scroll together where it is wider.
const room = () => Math.max(NARROWEST, $("stage").clientWidth);
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name);
const get = (name, i) => N[name] ? N[name][i] : null;
const count = x => x.toLocaleString("en");
const print = x => typeof x === "number" ? String(+x.toPrecision(4)) : String(x);
const damage = x => x < 0.0005 ? "< 0.001" : x.toFixed(3);
// Where columns say the position, labels need not;
// nor a long site's name, which its row has.
function short(i) {
  if (N.title[i] !== N.id[i]) return N.title[i];
  const name = D.columns.length ? N.id[i].replace(/@[^@]*$/, "") : N.id[i], site = get("site", i) || "";
  return site.length > 9 && name.startsWith(site) ? "…" + name.slice(site.length) : name;
}

// Text only ever enters the page through these two: labels stay text.
function el(tag, attributes, ...children) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(attributes || {})) k in e ? e[k] = v : e.setAttribute(k, v);
  e.append(...children);
  return e;
}
function sv(tag, attributes, text) {
  const e = document.createElementNS(NS, tag);
  for (const k in attributes) e.setAttribute(k, attributes[k]);
  if (text !== undefined) e.textContent = text;
  return e;
}

// Edges of the graph as it was before any were left out.
const whole = m + D.unembedded + D.hidden + D.cut.edges;
const into = Array.from({length: n}, () => []), out = Array.from({length: n}, () => []);
for (let e = 0; e < m; e++) { into[E.t[e]].push(e); out[E.s[e]].push(e); }
const byInfluence = [...Array(n).keys()].sort((a, b) => (get("influence", b) || 0) - (get("influence", a) || 0));
const named = new Map(N.id.map((id, i) => [id, i]));
const state = {view: D.overview ? "modules" : "graph", budget: Math.min(DEFAULT, m), picked: null, module: null, rows: PAGE};
const place = {x: new Float64Array(n), y: new Float64Array(n)};

// ------------------------------------------------------------------ heading, scores, key

function verdict() {
  const tried = D.scores.filter(one => one.figure === "damage");
  if (!tried.length) return [];
  const worst = tried.reduce((a, b) => a.damage > b.damage ? a : b), kinds = ["component", "circuit", "remainder"];
  const kept = N.kind.filter(kind => kinds.includes(kind)).length, parts = kept === 1 ? "this part" : `these ${count(kept)} parts`;
  const way = `, in the worst of ${tried.length} ways to ablate the rest (${worst.regime}). `;
  if (worst.damage > 1)
    return [el("b", {}, `Alone, ${parts} ${kept === 1 ? "does" : "do"} worse than nothing`), ` (damage ${damage(worst.damage)}, 1 is everything ablated)`, way];
  const lost = worst.damage < .001 ? "less than 0.1" : (100 * worst.damage).toFixed(1);
  return [el("b", {}, `Alone, ${parts} ${kept === 1 ? "loses" : "lose"} ${lost} % of what the model does`), way];
}

function heading() {
  $("heading").textContent = D.title;
  const signs = (up, down) => [el("b", {className: "up"}, "solid " + up), ", ", el("b", {className: "down"}, "dashed " + down)];
  if (D.about.schema === "weightdecomp.diff")
    $("lead").replaceChildren("Lines are changes of effects: ", ...signs("grew", "fell"), ". Nodes: green added, red removed, purple changed.");
  else if (state.view === "modules")
    $("lead").replaceChildren(...verdict(), "Every circle is a module: components that drive each other more than the rest, named by the most influential. " +
      "Arrows sum what one module does to another: ", ...signs("raises it", "lowers it"), ". Click a module to see inside.");
  else
    $("lead").replaceChildren(...verdict(), `Every dot is a ${N.kind.includes("unit") ? "unit" : "component, a part of one weight matrix"}. Read upwards, from the inputs to the outputs. ` +
      "A line says how much one drives the next: ", ...signs("raises it", "lowers it"), ", the wider the more. Click a dot for its numbers.");
}

function scores() {
  const box = $("scores");
  if (!D.scores.length) {
    box.append(el("p", {className: "note"}, D.about.schema === "weightdecomp.diff" ? "" : "Not scored yet: graphs.score runs the model on this graph alone."));
    return;
  }
  const table = el("table", {}, el("caption", {}, "Damage with all else ablated (0 none, 1 all lost)"));
  for (const one of D.scores) {
    const bar = el("i", {});
    bar.style.width = Math.max(0, Math.min(100, 100 * one.damage)) + "%";
    const name = one.figure === "completeness" ? "the circuit itself ablated (1 is best)" : one.regime;
    const more = one.evidence + ", " + one.budget + ", " + count(one.n_inputs || 0) + " inputs";
    table.append(el("tr", {title: more}, el("td", {}, name), el("td", {}, el("span", {className: "meter"}, bar)),
      el("td", {className: "figure"}, damage(one.damage)), el("td", {className: "note"}, one.evidence)));
  }
  box.append(table);
}

function key() {
  const text = "■ input or output  ● component  ◇ remainder (what the shown components of a matrix do not write)  △ bias. " +
    "Size: influence on the outputs. ";
  const about = el("details", {}, el("summary", {}, "How this graph was made"), el("pre", {}, JSON.stringify(D.about, null, 1)));
  $("key").append(text, about);
}

// ------------------------------------------------------------------ which nodes and edges are shown

function inside(i) { return state.module === null || get("module", i) === state.module; }
function chosenEdges() {
  const found = [];
  if (state.picked !== null) return [...into[state.picked], ...out[state.picked]];
  for (let e = 0; e < m && found.length < state.budget; e++)
    if (inside(E.s[e]) && inside(E.t[e])) found.push(e);
  return found;
}
function available() {
  if (state.module === null) return m;
  let k = 0;
  for (let e = 0; e < m; e++) k += inside(E.s[e]) && inside(E.t[e]);
  return k;
}

// ------------------------------------------------------------------ the layered drawing

function drawGraph() {
  const edges = chosenEdges(), picture = $("picture"), width = room();
  const seen = new Set();
  for (const e of edges) { seen.add(E.s[e]); seen.add(E.t[e]); }
  const members = state.module === null ? null : new Set([...Array(n).keys()].filter(inside));
  const rowsUsed = D.rows.map((_, r) => r).filter(r => !members || [...members].some(i => N.row[i] === r));
  const rank = new Map(rowsUsed.map((r, k) => [r, k]));
  const free = window.innerHeight - $("stage").getBoundingClientRect().top - window.scrollY - 60;
  const step = Math.max(46, Math.min(120, free / Math.max(1, rowsUsed.length)));
  const height = TOP + step * rowsUsed.length + (D.columns.length ? 18 : 0);
  resize(picture, width, height);
  picture.replaceChildren();
  const inner = width - LEFT - RIGHT, bands = [];
  rowsUsed.forEach((r, k) => {
    const y = TOP + step * (rowsUsed.length - 1 - k);
    if (k % 2) bands.push([y - TOP / 2, step]);
    const name = D.rows[r].length > 17 ? "…" + D.rows[r].slice(-16) : D.rows[r];
    const label = sv("text", {class: "row", x: 10, y: y + step / 2 - 8}, name);
    label.append(sv("title", {}, D.rows[r]));
    picture.append(label);
  });
  D.columns.forEach((title, c) => {
    const x = LEFT + inner * (c + .5) / D.columns.length;
    if (inner / D.columns.length > 18)
      picture.append(sv("text", {x, y: height - 6, "text-anchor": "middle"}, title.slice(0, Math.max(2, Math.floor(inner / D.columns.length / 7)))));
    picture.append(sv("line", {x1: LEFT + inner * c / D.columns.length, x2: LEFT + inner * c / D.columns.length, y1: 0, y2: height, class: "rule"}));
  });
  const layer = sv("g", {});
  const back = [], front = [], crowd = new Map();
  for (const r of N.row) crowd.set(r, (crowd.get(r) || 0) + 1);
  for (let i = 0; i < n; i++) {
    if (members && !members.has(i) && !seen.has(i)) continue;
    const k = rank.has(N.row[i]) ? rank.get(N.row[i]) : 0;
    // Neighbours in a crowded row stand a little above and below each other.
    const jitter = D.columns.length ? ((i * 7) % 3 - 1) * 5
      : inner / crowd.get(N.row[i]) < 12 ? ((i * 7) % 5 - 2) * Math.min(5, step / 14) : 0;
    place.x[i] = LEFT + inner * N.x[i];
    place.y[i] = TOP + step * (rowsUsed.length - 1 - k) + step / 2 - 12 + jitter;
    const shape = node(i, seen.has(i) || i === state.picked);
    (seen.has(i) || i === state.picked ? front : back).push(shape);
  }
  layer.append(...back, ...front);
  picture.append(layer, labels(seen, members));
  drawLines(edges, width, height, bands);
  counts(edges.length, seen.size || (members ? members.size : 0));
}

function resize(picture, width, height) {
  picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
  picture.setAttribute("width", width);
  picture.setAttribute("height", height);
}

function node(i, lit) {
  const kind = N.kind ? N.kind[i] : "component", influence = get("influence", i) || 0;
  const r = (kind === "bias" || kind === "remainder" ? 3 : 3.6) + 7 * Math.sqrt(Math.min(1, influence));
  const x = place.x[i], y = place.y[i];
  let shape;
  if (kind === "input" || kind === "output") shape = sv("rect", {x: x - r * .8, y: y - r * .8, width: 1.6 * r, height: 1.6 * r});
  else if (kind === "remainder") shape = sv("path", {d: `M${x} ${y - r}L${x + r} ${y}L${x} ${y + r}L${x - r} ${y}Z`});
  else if (kind === "bias") shape = sv("path", {d: `M${x} ${y - r}L${x + r} ${y + r * .8}L${x - r} ${y + r * .8}Z`});
  else shape = sv("circle", {cx: x, cy: y, r});
  const status = get("status", i);
  shape.setAttribute("class", "node " + kind + (status ? " " + status : "") + (lit ? "" : " faint") + (i === state.picked ? " picked" : ""));
  shape.setAttribute("data-node", i);
  shape.append(sv("title", {}, N.title[i]));
  return shape;
}

function labels(seen, members) {
  const layer = sv("g", {}), taken = [];
  const wanted = state.picked !== null ? [state.picked, ...[...seen].filter(i => i !== state.picked)]
    : byInfluence.filter(i => seen.has(i) && (!members || members.has(i)));
  const outputs = wanted.filter(i => N.kind && N.kind[i] === "output");
  let left = LABELS;
  for (const i of [...new Set([...wanted.slice(0, 1), ...outputs, ...wanted])]) {
    const special = N.kind && (N.kind[i] === "output" || N.kind[i] === "input");
    if (!special && left <= 0) continue;
    const own = short(i), title = own.length > 22 ? own.slice(0, 21) + "…" : own;
    if (D.columns.length && N.kind && N.kind[i] === "input" && D.columns.includes(title)) continue;
    // Lines leave inputs upwards, so that there is room below.
    const w = title.length * 7, x = place.x[i], y = place.y[i] + (N.kind && N.kind[i] === "input" ? 18 : -11);
    if (taken.some(t => Math.abs(t.y - y) < 13 && Math.abs(t.x - x) < (t.w + w) / 2 + 3)) continue;
    taken.push({x, y, w});
    if (!special) left--;
    const edge = room() - 4 - w / 2;
    layer.append(sv("text", {class: "halo", x: Math.min(x, edge), y, "text-anchor": "middle"}, title));
  }
  return layer;
}

function drawLines(edges, width, height, bands) {
  const canvas = $("lines"), ratio = window.devicePixelRatio || 1;
  canvas.width = width * ratio; canvas.height = height * ratio;
  canvas.style.width = width + "px"; canvas.style.height = height + "px";
  const c = canvas.getContext("2d");
  c.scale(ratio, ratio);
  // Behind the lines: the picture with the nodes lies above this canvas.
  c.fillStyle = colour("--raised");
  for (const [y, tall] of bands) c.fillRect(0, y, width, tall);
  const most = Math.max(...edges.map(e => E.share[e]), 1e-9), crowd = Math.min(1, Math.sqrt(120 / Math.max(1, edges.length)));
  const up = colour("--up"), down = colour("--down");
  for (let k = edges.length - 1; k >= 0; k--) {
    const e = edges[k], a = E.s[e], b = E.t[e], size = Math.sqrt(E.share[e] / most);
    const x = place.x[a], y = place.y[a], u = place.x[b], v = place.y[b], mid = (y + v) / 2;
    c.beginPath();
    c.moveTo(x, y);
    c.bezierCurveTo(x, mid, u, mid, u, v);
    c.strokeStyle = E.w[e] < 0 ? down : up;
    c.setLineDash(E.w[e] < 0 ? [5, 3] : []);
    c.globalAlpha = .12 + (.25 + .55 * crowd) * size;
    c.lineWidth = .5 + 4.5 * size * (.35 + .65 * crowd);
    c.stroke();
  }
}

function counts(edges, nodes) {
  const more = [];
  if (D.cut.edges) more.push(count(D.cut.edges) + " pruned away");
  if (D.hidden) more.push(count(D.hidden) + " left out when it was built");
  if (D.unembedded) more.push(count(D.unembedded) + " too small for this page");
  const of = state.module === null ? "" : " of module " + state.module;
  $("counts").textContent = `showing ${count(nodes)} of ${count(n + D.cut.nodes)} nodes, ${count(edges)} of ${count(whole)} edges` +
    of + (more.length ? ` (${more.join(", ")})` : "");
}

// ------------------------------------------------------------------ the overview of modules

function groups() {
  const found = new Map();
  for (const i of byInfluence) {
    const g = get("module", i);
    if (g === null) continue;
    if (!found.has(g)) found.set(g, []);
    found.get(g).push(i);
  }
  return found;
}

function drawModules() {
  const picture = $("picture"), width = room(), found = groups();
  const height = Math.max(420, Math.min(760, window.innerHeight - 190));
  resize(picture, width, height);
  picture.replaceChildren();
  const between = new Map(), joined = new Set();
  for (let e = 0; e < m; e++) {
    const a = get("module", E.s[e]), b = get("module", E.t[e]);
    if (a === null || b === null || a === b) continue;
    const id = a + "|" + b, size = E.share[e] * Math.abs(get("influence", E.t[e]) || 1);
    const sum = between.get(id) || [a, b, 0, 0];
    joined.add(a).add(b); sum[2] += size; sum[3] += size * Math.sign(E.w[e]);
    between.set(id, sum);
  }
  const at = new Map(), order = [];
  let alone = 0;
  const most = Math.max(...[...found.values()].map(one => one.length));
  for (const [g, members] of found) {
    // A node that no edge joins to a module says nothing here.
    if (members.length === 1 && !joined.has(g)) { alone++; continue; }
    const deep = members.reduce((sum, i) => sum + N.row[i], 0) / members.length;
    order.push({g, members, deep, wide: members.reduce((sum, i) => sum + N.x[i], 0) / members.length});
  }
  // Few lanes by depth, and in each modules from left to right.
  order.sort((a, b) => a.deep - b.deep);
  const lanes = Math.max(1, Math.ceil(Math.sqrt(order.length))), per = Math.ceil(order.length / lanes);
  for (let lane = 0; lane < lanes; lane++) {
    const own = order.slice(lane * per, (lane + 1) * per).sort((a, b) => a.wide - b.wide);
    own.forEach((one, k) => at.set(one.g, {
      x: 60 + (width - 120) * (k + .5) / own.length,
      y: height - 92 - (height - 172) * (lanes > 1 ? lane / (lanes - 1) : .5) + (k % 2 ? 16 : -16),
      r: 9 + 30 * Math.sqrt(one.members.length / most), members: one.members, deep: one.deep}));
  }
  const all = [...between.values()].sort((a, b) => b[2] - a[2]), lines = all.slice(0, 60), strongest = lines.length ? lines[0][2] : 1;
  const layer = sv("g", {fill: "none"});
  for (const [a, b, size, signed] of lines.reverse()) {
    // Both directions bow to their own left, so that neither hides the other; the arrow stands in the middle.
    const p = at.get(a), q = at.get(b), dx = q.x - p.x, dy = q.y - p.y, sign = signed < 0 ? "down" : "up";
    const wide = .7 + 9 * Math.sqrt(size / strongest), bow = Math.min(.16, 45 / Math.hypot(dx, dy)), x = (p.x + q.x) / 2 + bow * dy, y = (p.y + q.y) / 2 - bow * dx;
    const line = sv("path", {d: `M${p.x} ${p.y}Q${x + bow * dy} ${y - bow * dx} ${q.x} ${q.y}`, class: sign, stroke: "currentColor", "stroke-width": wide, "stroke-opacity": .4});
    if (signed < 0) line.setAttribute("stroke-dasharray", "7 4");
    const turn = Math.atan2(dy, dx) * 180 / Math.PI, tip = 5 + wide;
    layer.append(line, sv("path", {d: `M${-tip / 2} ${-tip / 2}L${tip / 2} 0L${-tip / 2} ${tip / 2}Z`, class: sign, fill: "currentColor", transform: `translate(${x} ${y}) rotate(${turn})`}));
  }
  picture.append(layer);
  for (const [g, one] of at) {
    const circle = sv("circle", {class: "node", cx: one.x, cy: one.y, r: one.r, tabindex: 0, role: "button", "data-module": g,
      "aria-label": `module ${g}, ${one.members.length} nodes`});
    circle.append(sv("title", {}, one.members.slice(0, 8).map(i => N.title[i]).join("\n")));
    // No row tells the site here, so that titles stand whole; of long ones the end says more.
    const led = one.members.slice(0, 2).map(i => N.title[i]).map(own => own.length > 18 ? "…" + own.slice(-17) : own).join(", ");
    const more = one.members.length > 2 ? ` and ${count(one.members.length - 2)} more` : "";
    picture.append(circle, sv("text", {class: "halo", x: one.x, y: one.y + one.r + 14, "text-anchor": "middle"}, led),
      sv("text", {class: "halo row", x: one.x, y: one.y + one.r + 28, "text-anchor": "middle"}, more));
  }
  picture.append(sv("text", {class: "row", x: 12, y: 18}, "outputs above"), sv("text", {class: "row", x: 12, y: height - 8}, "inputs below"));
  const canvas = $("lines");
  canvas.width = canvas.height = 0;
  const left = alone ? `, ${count(alone)} single nodes without bundles left out` : "";
  $("counts").textContent = `${count(at.size)} modules of ${count(n)} nodes, ${count(lines.length)} of ${count(all.length)} bundles of ` +
    `${count(whole - D.cut.edges)} edges${left}`;
}

// ------------------------------------------------------------------ the table

function drawTable() {
  const box = $("table"), word = $("search").value.trim().toLowerCase();
  const found = byInfluence.filter(i => inside(i) && matches(i, word));
  const head = ["node", "kind", "influence", "importance", "activation", "in", "out"];
  const table = el("table", {}, el("thead", {}, el("tr", {}, ...head.map(h => el("th", {scope: "col"}, h)))));
  const body = el("tbody", {});
  for (const i of found.slice(0, state.rows)) {
    const name = el("button", {type: "button"}, N.title[i]);
    name.dataset.pick = i;
    const cells = [get("kind", i), get("influence", i), get("importance", i), get("activation", i)].map(x => el("td", {}, x === null ? "" : print(x)));
    body.append(el("tr", {}, el("th", {scope: "row"}, name), ...cells, el("td", {}, into[i].length), el("td", {}, out[i].length)));
  }
  table.append(body);
  box.replaceChildren(el("p", {className: "note"}, `${count(Math.min(found.length, state.rows))} of ${count(found.length)} nodes, most influential first`), table);
  if (found.length > state.rows) {
    const more = el("button", {type: "button"}, "more rows");
    more.onclick = () => { state.rows += PAGE; drawTable(); };
    box.append(more);
  }
  counts(m, found.length);
}

// ------------------------------------------------------------------ the card

function card() {
  const box = $("card"), i = state.picked;
  if (i === null) { box.replaceChildren(...emptyCard()); return; }
  const list = [];
  for (const [name, label] of [["importance", "importance"], ["frequency", "active on"], ["activation", "activation"], ["std", "± over inputs"],
    ["influence", "influence"], ["unaccounted", "unaccounted"], ["minimality", "damage if removed"], ["circuit", "circuit"], ["module", "module"],
    ["status", "status"], ["before", "before"], ["after", "after"], ["top_inputs", "top inputs, number: value"]]) {
    const x = get(name, i);
    if (x !== null && x !== undefined) list.push([label, name === "frequency" ? print(100 * x) + " %" : print(x)]);
  }
  const facts = el("dl", {});
  for (const [k, v] of list) facts.append(el("dt", {}, k), el("dd", {}, v === null ? "" : String(v)));
  const what = [get("kind", i), get("site", i) ? "of " + get("site", i) : "", get("call", i) !== null ? "call " + get("call", i) : "",
    get("position", i) !== null ? "at position " + get("position", i) : "", N.id[i] === N.title[i] ? "" : "id " + N.id[i]];
  // Isolated, as an override of direction in one label would turn the next ones round.
  const told = what.filter(x => x).flatMap((x, k) => [k ? ", " : "", el("bdi", {}, x)]);
  box.replaceChildren(el("h2", {}, N.title[i]), el("p", {className: "note"}, ...told), facts, ...picture(i),
    ...links("in", into[i], E.s), ...links("out", out[i], E.t));
}

function emptyCard() {
  const top = byInfluence.filter(i => ["component", "circuit", "unit", "pair"].includes(get("kind", i))).slice(0, 10);
  const list = el("ol", {});
  for (const i of top) list.append(entry(i, get("influence", i)));
  return [el("h2", {}, "Most influential"), el("p", {className: "note"}, "Share of the outputs that flows through a component."), list];
}

function entry(i, number, sign) {
  const button = el("button", {type: "button", title: N.title[i]}, N.title[i]), value = el("span", {className: sign || ""}, number === null ? "" : print(number));
  button.dataset.pick = i;
  return el("li", {}, button, value);
}

function links(name, edges, ends) {
  const list = el("ol", {id: "links-" + name});
  for (const e of [...edges].sort((a, b) => E.share[b] - E.share[a])) {
    const item = entry(ends[e], E.w[e], E.w[e] < 0 ? "down" : "up");
    item.lastChild.textContent = (E.w[e] < 0 ? "− " : "+ ") + print(Math.abs(E.w[e])) + (E.error ? " ± " + print(E.error[e]) : "");
    item.title = print(100 * E.share[e]) + " % of what enters " + N.title[E.t[e]];
    list.append(item);
  }
  const head = name === "in" ? `Driven by (${edges.length})` : `Drives (${edges.length})`;
  return [el("h3", {}, head), edges.length ? list : el("p", {className: "note"}, "nothing")];
}

function bytes(text) { return Int8Array.from(atob(text), c => c.charCodeAt(0) << 24 >> 24); }
function picture(i) {
  if (!get("reads", i) || !get("writes", i)) return [];
  const reads = bytes(N.reads[i]), writes = bytes(N.writes[i]);
  const side = Math.round(Math.sqrt(reads.length)), square = side * side === reads.length && side > 2;
  const found = [el("h3", {}, "Weight: what it reads (across) and writes (down)"), heat(reads.length, writes.length, (x, y) => reads[x] * writes[y] / 16129)];
  if (square) found.push(el("p", {className: "note"}, `what it reads, as a ${side} × ${side} picture`), heat(side, side, (x, y) => reads[y * side + x] / 127));
  return found;
}
function heat(width, height, value) {
  const canvas = el("canvas", {width, height}), c = canvas.getContext("2d"), image = c.createImageData(width, height);
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
    const v = Math.max(-1, Math.min(1, value(x, y))), a = Math.sqrt(Math.abs(v)), p = 4 * (y * width + x);
    const to = v < 0 ? [196, 80, 12] : [11, 110, 153];
    for (let k = 0; k < 3; k++) image.data[p + k] = 255 + (to[k] - 255) * a;
    image.data[p + 3] = 255;
  }
  c.putImageData(image, 0, 0);
  const scale = Math.max(1, Math.min(12, Math.floor(240 / width), Math.floor(200 / height)));
  canvas.style.width = width * scale + "px"; canvas.style.height = height * scale + "px";
  canvas.setAttribute("role", "img"); canvas.setAttribute("aria-label", "weight, blue positive, orange negative");
  return canvas;
}

// ------------------------------------------------------------------ what the user does

function matches(i, word) {
  return !word || N.id[i].toLowerCase().includes(word) || N.title[i].toLowerCase().includes(word);
}
function views() {
  const box = $("views"), names = {graph: "graph", table: "table"};
  if (N.module) box.append(button("modules", "modules"));
  for (const k in names) box.append(button(k, names[k]));
  function button(view, label) {
    const b = el("button", {type: "button"}, label);
    b.dataset.view = view;
    b.onclick = () => { state.view = view; if (view === "modules") { state.module = null; state.picked = null; } draw(); };
    return b;
  }
}
function pick(i) {
  state.picked = i;
  if (state.view === "modules") state.view = "graph";
  draw();
}
function draw() {
  for (const b of $("views").children) b.setAttribute("aria-pressed", b.dataset.view === state.view);
  $("stage").hidden = state.view === "table";
  $("table").hidden = state.view !== "table";
  heading();
  card();
  if (state.view === "table") drawTable();
  else if (state.view === "modules") drawModules();
  else drawGraph();
}
// The slider runs over the logarithm of the number of edges.
const toSlider = k => m > 1 ? Math.round(1000 * Math.log(Math.max(1, k)) / Math.log(m)) : 1000;
const fromSlider = v => Math.min(m, Math.max(1, Math.round(Math.exp(v / 1000 * Math.log(Math.max(2, m))))));
$("budget").value = toSlider(state.budget);
$("budget").oninput = () => { state.budget = fromSlider(+$("budget").value); state.picked = null; if (state.view !== "table") state.view = "graph"; draw(); };
$("search").oninput = () => { state.rows = PAGE; if (state.view === "table") drawTable(); };
$("search").onkeydown = event => {
  if (event.key !== "Enter") return;
  const word = $("search").value.trim().toLowerCase(), exact = named.get($("search").value.trim());
  const i = exact !== undefined ? exact : byInfluence.find(one => word && matches(one, word));
  if (i !== undefined) { state.module = null; pick(i); }
  else $("counts").textContent = "no node matches";
};
$("clear").onclick = () => { state.picked = null; state.module = null; $("search").value = ""; draw(); };
document.addEventListener("keydown", event => { if (event.key === "Escape") $("clear").onclick(); });
document.addEventListener("click", event => {
  const own = event.target.closest("[data-pick]"), shape = event.target.closest("[data-node]"), group = event.target.closest("[data-module]");
  if (own) pick(+own.dataset.pick);
  else if (shape) pick(+shape.dataset.node);
  else if (group) open(+group.dataset.module);
});
$("picture").addEventListener("keydown", event => {
  const group = event.target.closest("[data-module]");
  if (group && (event.key === "Enter" || event.key === " ")) { event.preventDefault(); open(+group.dataset.module); }
});
function open(g) { state.module = g; state.view = "graph"; draw(); }
let waiting = 0;
window.addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(draw, 100); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

scores(); key(); views(); draw();
document.body.dataset.drawn = (performance.now() - began).toFixed(1);
})();
