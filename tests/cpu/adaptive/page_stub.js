// Runs a report's script in Node on as little of a document as it needs, and tells what it drew.
"use strict";
const text = require("fs").readFileSync(process.argv[2], "utf8");
class Node {
  constructor(name) {
    this.name = name; this.children = []; this.attributes = new Map(); this.dataset = {}; this.style = {};
    this.listeners = new Map(); this.clientWidth = this.offsetWidth = this.offsetHeight = 800; this.value = "";
  }
  append(...nodes) { for (const n of nodes) { n.parentElement = this; this.children.push(n); } }
  replaceChildren(...nodes) { this.children = []; this.append(...nodes); }
  setAttribute(name, value) { this.attributes.set(name, String(value)); }
  addEventListener(kind, f) { this.listeners.set(kind, f); }
  fire(kind) { this.listeners.get(kind)({ matches: false, clientX: 0, clientY: 0 }); }
  all(test) { return this.children.flatMap((c) => [...(test(c) ? [c] : []), ...c.all(test)]); }
  get tHead() { return (this.head ??= this.made("thead")); }
  get tBodies() { return [(this.body ??= this.made("tbody"))]; }
  made(name) { const n = new Node(name); this.append(n); return n; }
}
class SVGElement extends Node {}
const ids = new Map(), root = new Node("html");
for (const [, name, id] of text.matchAll(/<(\w+)[^>]* id="([^"]+)"/g)) {
  const n = name === "svg" ? new SVGElement(name) : new Node(name);
  n.parentElement = root;
  ids.set(id, n);
}
ids.get("data").textContent = text.match(/<script type="application\/json" id="data">(.*?)<\/script>/s)[1];
globalThis.document = {
  documentElement: root, getElementById: (id) => ids.get(id) ?? null,
  createElement: (n) => new Node(n), createElementNS: (_, n) => new SVGElement(n),
};
globalThis.SVGElement = SVGElement;
globalThis.getComputedStyle = () => ({ getPropertyValue: () => "#123456" });
globalThis.matchMedia = () => ({ matches: false, addEventListener() {} });
globalThis.addEventListener = () => {};
globalThis.innerWidth = globalThis.innerHeight = 1000;
(0, eval)(text.match(/<script>(.*)<\/script>/s)[1]);
const layer = ids.get("layer"), cell = (n) => n.attributes.get("class") === "cell";
const cells = ids.get("heat").all(cell);
for (const c of cells) c.fire("mousemove");
const drawn = layer.children.map((option, i) => {
  layer.value = String(i);
  layer.fire("change");
  return ids.get("tensors").all((n) => n.name === "polyline").length > 0;
});
console.log(JSON.stringify({
  ready: root.dataset.ready, cells: cells.length, layers: layer.children.map((o) => o.textContent), drawn,
}));
