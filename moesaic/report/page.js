/* What a reader can do in a report: sort and filter tables, look at the routing of single words.
   Plain JavaScript without libraries; the page says the most important without it. */
"use strict";

const MOST_ROWS = 200;

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/* A table: {columns: [{key, title, numeric, digits}], rows: [[...]]}. */
function sortable(place) {
  const data = JSON.parse(place.querySelector("script").textContent);
  const filter = element("input", {
    type: "search", "aria-label": "Filter rows",
    placeholder: "filter: words, or layer=3 srp>0.5",
  });
  const count = element("span", { class: "count", role: "status" });
  const body = element("tbody");
  const head = element("tr");
  let order = null, descending = false, shown = MOST_ROWS;

  const write = (value, column) => {
    if (value === null || value === undefined) return "–";
    if (!column.numeric) return String(value);
    return column.digits === 0 ? value.toLocaleString("en") : value.toFixed(column.digits);
  };

  function matching() {
    const conditions = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    return data.rows.filter((row) => conditions.every((condition) => {
      const [, name, sign, wanted] = condition.match(/^([^<>=]+)(<=|>=|=|<|>)(.+)$/) || [];
      if (!sign) return row.some((value, i) => write(value, data.columns[i]).toLowerCase().includes(condition));
      const at = data.columns.findIndex((column) =>
        [column.key, column.title].some((text) => text.toLowerCase().replaceAll(" ", "_") === name));
      if (at < 0) return false;
      const value = row[at], number = Number(wanted);
      if (value === null) return false;
      if (Number.isNaN(number) || !data.columns[at].numeric) return sign === "=" && String(value).toLowerCase().includes(wanted);
      return { "<": value < number, ">": value > number, "=": value === number, "<=": value <= number, ">=": value >= number }[sign];
    }));
  }

  function draw() {
    let rows = matching();
    if (order !== null) {
      const sign = descending ? -1 : 1;
      rows = [...rows].sort((one, two) => {
        const [a, b] = [one[order], two[order]];
        if (a === null || b === null) return (a === null) - (b === null);
        return sign * (typeof a === "number" ? a - b : String(a).localeCompare(String(b)));
      });
    }
    body.replaceChildren(...rows.slice(0, shown).map((row) => element("tr", {}, ...row.map((value, i) =>
      element("td", { class: data.columns[i].numeric ? "number" : "" }, write(value, data.columns[i]))))));
    count.textContent = `${Math.min(shown, rows.length).toLocaleString("en")} of ${rows.length.toLocaleString("en")} rows`;
    more.hidden = rows.length <= shown;
    [...head.children].forEach((cell, i) => {
      const state = order === i ? (descending ? "descending" : "ascending") : "none";
      cell.setAttribute("aria-sort", state);
    });
  }

  data.columns.forEach((column, i) => {
    const button = element("button", { type: "button" }, column.title);
    button.addEventListener("click", () => {
      descending = order === i ? !descending : column.numeric;
      order = i;
      draw();
    });
    head.append(element("th", { scope: "col", class: column.numeric ? "number" : "" }, button));
  });
  const more = element("button", { type: "button", class: "more" }, "show more rows");
  more.addEventListener("click", () => { shown += MOST_ROWS; draw(); });
  filter.addEventListener("input", () => { shown = MOST_ROWS; draw(); });
  const table = element("table", {}, element("thead", {}, head), body);
  place.append(element("div", { class: "tools" }, filter, count), element("div", { class: "scroll tall" }, table), more);
  draw();
}

/* Words of a sample coloured by expert: {layers, cases: [{domain, words, experts, width, best, consistency}]}. */
function routed(place) {
  const data = JSON.parse(place.querySelector("script").textContent);
  const choose = element("select", { "aria-label": "Text" },
    ...data.cases.map((one, i) => element("option", { value: i }, one.domain)));
  const layer = element("select", { "aria-label": "Layer" });
  const rank = element("select", { "aria-label": "Choice" });
  const legend = element("div", { class: "legend" });
  const text = element("div", { class: "words" });
  const said = element("p", { class: "notes", role: "status" }, "Point at a word to see its experts.");
  let chosen = null;

  const decoded = (one) => {
    if (!one.bytes) {
      const raw = Uint8Array.from(atob(one.experts), (c) => c.charCodeAt(0));
      one.bytes = one.size === 1 ? raw : new Uint16Array(raw.buffer);
      one.width = one.bytes.length / (one.words.length * data.layers.length);
    }
    return one.bytes;
  };
  const at = (one, token, place, k) => {
    const expert = decoded(one)[(token * data.layers.length + place) * one.width + k];
    return expert === (one.size === 1 ? 255 : 65535) ? null : expert;
  };

  function draw() {
    const one = data.cases[Number(choose.value)], place = Number(layer.value), k = Number(rank.value);
    const counts = new Map();
    one.words.forEach((_, t) => {
      const expert = at(one, t, place, k);
      if (expert !== null) counts.set(expert, (counts.get(expert) || 0) + 1);
    });
    const ranked = [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
    const colour = new Map(ranked.map(([expert], i) => [expert, i < 12 ? `c${i}` : "rest"]));
    legend.replaceChildren(...ranked.slice(0, 12).map(([expert, n]) => {
      const button = element("button", { type: "button", class: `${colour.get(expert)}`, "aria-pressed": chosen === expert }, `expert ${expert}: ${n}`);
      button.addEventListener("click", () => { chosen = chosen === expert ? null : expert; draw(); });
      return button;
    }));
    if (ranked.length > 12) legend.append(element("span", { class: "count" }, `and ${ranked.length - 12} more`));
    text.replaceChildren(...one.words.map((word, t) => {
      const expert = at(one, t, place, k);
      const faded = chosen !== null && expert !== chosen ? " faded" : "";
      return element("span", { class: `${expert === null ? "none" : colour.get(expert)}${faded}`, "data-token": t }, word);
    }));
  }

  function layers() {
    const one = data.cases[Number(choose.value)];
    decoded(one);
    layer.replaceChildren(...data.layers.map((number, i) => element("option", { value: i },
      `layer ${number}${i === one.best ? ", the most consistent" : ""} (${one.consistency[i].toFixed(2)})`)));
    layer.value = one.best;
    rank.replaceChildren(...Array.from({ length: one.width }, (_, k) => element("option", { value: k }, `choice ${k + 1}`)));
    chosen = null;
    draw();
  }

  text.addEventListener("mouseover", (event) => {
    const token = event.target.dataset.token;
    if (token === undefined) return;
    const one = data.cases[Number(choose.value)], place = Number(layer.value);
    const experts = Array.from({ length: one.width }, (_, k) => at(one, Number(token), place, k));
    said.textContent = `Word ${Number(token) + 1}, “${one.words[token].trim()}”: experts ${experts.map((e) => e ?? "none").join(", ")}`;
  });
  choose.addEventListener("change", layers);
  layer.addEventListener("change", () => { chosen = null; draw(); });
  rank.addEventListener("change", () => { chosen = null; draw(); });
  place.append(element("div", { class: "tools" }, choose, layer, rank), legend, text, said);
  layers();
}

document.querySelectorAll("[data-sortable]").forEach(sortable);
document.querySelectorAll("[data-routed]").forEach(routed);
