"use strict";
// The dashboard's pages. Whatever comes from runs goes in as text, never as HTML.

const main = document.getElementById("main"), problem = document.getElementById("problem");
const ticked = new Set();
let shown = 0, timer = 0;

function el(tag, about = {}, ...inside) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(about))
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made && name !== "list") made[name] = value;
    else made.setAttribute(name, value);
  made.append(...inside.flat().filter(one => one !== null && one !== undefined && one !== ""));
  return made;
}

async function ask(name, values, method = "GET") {
  const query = method === "GET" && values ? "?" + new URLSearchParams(values) : "";
  const more = method === "POST" ? { method, body: JSON.stringify(values) } : {};
  const answer = await fetch(`api/${name}${query}`, more);
  if (answer.status === 403) throw new Error(await answer.text());
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error);
  return found;
}
const post = (name, values) => ask(name, values, "POST");

function complain(error) {
  problem.hidden = !error;
  problem.textContent = error ? error.message : "";
  if (error) problem.scrollIntoView({ block: "nearest" });
}

const button = (text, act, kind = "") => el("button", { type: "button", className: `do ${kind}`, onclick: async event => {
  const mine = event.currentTarget;
  mine.disabled = true;
  complain(null);
  try { await act(); } catch (error) { complain(error); }
  mine.disabled = false;
} }, text);

const link = (where, ...parts) => `#/${where}/` + parts.map(encodeURIComponent).join("/");
const number = (value, digits = 1) => value === null || value === undefined ? "–" : value.toFixed(digits);

function span(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"]])
    if (seconds >= size) return `${(seconds / size).toFixed(seconds < 10 * size ? 1 : 0)} ${unit}`;
  return `${Math.round(seconds)} s`;
}

const state = (run, error) => {
  const name = run.state === "stopped" && error ? "failed" : run.state;
  return el("span", { className: `state ${name}` }, name);
};

function table({ title, head, rows, words, notes }) {
  if (!rows.length) return "";
  const cells = (tag, values) => values.map((v, i) => el(tag, { className: i < words ? "text" : "", title: v }, v));
  const lines = rows.map(row => el("tr", {}, cells("td", row)));
  const box = el("div", { className: "scroll" + (rows.length > 30 ? " tall" : "") }, el("table", {}, el("tr", {}, cells("th", head)), lines));
  return el("section", {}, el("h2", {}, title), box, (notes || []).map(note => el("p", { className: "about" }, note)));
}

const SVG = "http://www.w3.org/2000/svg";
function marks(key) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 26 12");
  for (const mark of key.marks) {
    const path = document.createElementNS(SVG, "path");
    for (const [name, value] of Object.entries(mark)) path.setAttribute(name, value);
    svg.append(path);
  }
  return svg;
}

function figure(drawing, old) {
  const box = old || el("figure", { id: `figure-${drawing.id}` });
  const plot = (old && old.querySelector(".plot")) || el("div", { className: "plot", id: drawing.id });
  const hidden = new Set([...box.querySelectorAll(".key.off")].map(key => key.textContent));
  const keys = drawing.keys.map(key => {
    const off = hidden.has(key.name);
    if (off) key.traces.forEach(i => { drawing.plot.data[i].visible = false; });
    const made = el("button", { type: "button", className: off ? "key off" : "key" }, marks(key), el("span", {}, key.name));
    Object.assign(made.dataset, { figure: drawing.id, traces: JSON.stringify(key.traces) });
    return made;
  });
  plot.style.minWidth = `${drawing.least}px`;
  const caption = el("figcaption", {}, drawing.title, el("span", {}, drawing.note));
  const legend = keys.length ? el("div", { className: "legend" }, keys) : "";
  box.replaceChildren(...[caption, legend, el("div", { className: "scroll" }, plot)].filter(Boolean));
  requestAnimationFrame(() => Plotly.react(plot, drawing.plot.data, drawing.plot.layout, { responsive: true, displayModeBar: false }));
  return box;
}

const notes = lines => lines && lines.length ? el("section", {}, el("h2", {}, "Notes"), el("ul", {}, lines.map(line => el("li", {}, line)))) : "";

// ---------------------------------------------------------------------------------------------------------------- runs

async function listPage(page) {
  const rows = el("div"), count = el("p", { className: "about" });
  const compare = button("Compare ticked runs", () => { location.hash = link("compare", ...ticked); });
  const search = el("input", { type: "search", placeholder: "find", "aria-label": "find runs", oninput: () => draw() });
  let found = null, last = "";
  page.append(el("h1", {}, "Runs"), el("p", {}, search, " ", compare), count, rows);

  const card = run => {
    const bad = run.error || "", tick = el("input", { type: "checkbox", checked: ticked.has(run.path), "aria-label": `compare ${run.path}`, onchange: () => {
      tick.checked ? ticked.add(run.path) : ticked.delete(run.path);
      compare.disabled = ticked.size < 2;
    } });
    const done = el("i");
    done.style.width = `${100 * run.round / Math.max(run.rounds, 1)}%`;
    const parts = [`${run.method} · ${run.clients} clients · round ${run.round} of ${run.rounds}`];
    if (run.eta !== null) parts.push(`about ${span(run.eta)} left`);
    if (run.loss !== null) parts.push(`loss ${number(run.loss, 3)}`);
    if (run.mean !== null) parts.push(`mean ${run.metric} ${number(run.mean)}`);
    parts.push(`${run.state === "finished" ? "ended" : "heard of"} ${span(run.heard)} ago`);
    return el("div", { className: "card" }, tick, el("a", { className: "name", href: link("run", run.path) }, run.path), state(run, bad),
      el("span", { className: "more" }, parts.join(" · ")), el("div", { className: "bar" }, done), bad && el("span", { className: "more error" }, bad));
  };
  const other = one => el("div", { className: "card" }, el("span"), el("span", { className: "name" }, one.path),
    state({ state: one.alive ? "running" : "stopped" }, one.error),
    el("span", { className: `more ${one.error ? "error" : ""}` }, one.error || "in progress: a comparison, or a run before its first round"),
    el("span", { className: "more" }, one.alive ? button("Stop", () => post("stop", { path: one.path })) : button("Forget", () => post("forget", { path: one.path }))));

  const draw = () => {
    const wanted = search.value.toLowerCase(), fits = name => name.toLowerCase().includes(wanted);
    const runs = found.runs.filter(run => fits(`${run.path} ${run.method} ${run.state}`));
    count.textContent = `${runs.length} of ${found.runs.length} runs in ${found.root}`;
    compare.disabled = ticked.size < 2;
    const compared = found.comparisons.filter(fits).map(path => el("li", {}, el("a", { href: link("comparison", path) }, path)));
    rows.replaceChildren(...found.started.map(other), ...runs.map(card),
      ...(compared.length ? [el("h2", {}, "Comparisons"), el("ul", {}, compared)] : []),
      ...(found.runs.length + found.started.length ? [] : [el("p", {}, "No run yet. ", el("a", { href: "#/new" }, "Start one"), ".")]));
  };
  return async () => {
    found = await ask("listed");
    const now = JSON.stringify(found, (key, value) => key === "heard" || key === "eta" ? value && span(value) : value);
    if (now !== last) draw();
    last = now;
  };
}

async function runPage(page, path) {
  const head = el("h1", {}, path), about = el("p", { className: "about" }), facts = el("div", { className: "facts" });
  const does = el("p"), error = el("p", { className: "error" }), body = el("div");
  let have = "", buttons = "";
  page.append(head, about, does, error, facts, body);
  const fact = (name, value) => el("div", {}, el("span", {}, name), el("b", {}, value));
  return async () => {
    const run = await ask("run", { path, have }), now = run.summary, own = run.started;
    const alive = own && own.alive || now && now.state === "running";
    const bad = alive ? "" : own && own.error || "";
    const condition = { state: alive ? "running" : now ? now.state : "stopped" };
    error.textContent = bad || (now && now.error) || "";
    const can = JSON.stringify([alive, condition, run.talks, run.report]);
    if (can !== buttons) {
      buttons = can;
      does.replaceChildren(state(condition, bad), " ", ...[
        alive && button("Stop", () => post("stop", { path })),
        !alive && condition.state !== "finished" && button("Resume", () => post("resume", { path }), "main"),
        run.talks && el("a", { href: link("chat", path) }, button("Chat", () => {}, "main")),
        run.report && el("a", { href: `report/${path.split("/").map(encodeURIComponent).join("/")}`, target: "_blank" }, button("Report", () => {})),
        el("a", { href: link("new", "run", path) }, button("New run like this", () => {})),
      ].filter(Boolean));
    }
    if (now) facts.replaceChildren(fact("round", `${now.round} of ${now.rounds}`), fact("time left", alive ? span(now.eta) : "–"),
      fact(`mean ${now.metric}`, number(now.mean)), fact("training loss", number(now.loss, 3)), fact("sent in a round", `${number(now.bytes / 1e6, 2)} MB`),
      fact("memory", `${number(now.memory, 2)} GB`), fact("heard of", `${span(now.heard)} ago`));
    if (run.version === have) return;
    have = run.version;
    if (!run.tables) return;
    head.textContent = path === "." ? run.title : path;
    about.textContent = `${run.title}. ${run.about}`;
    const old = Object.fromEntries([...body.querySelectorAll("figure")].map(one => [one.id, one]));
    body.replaceChildren(...[...run.figures.map(one => figure(one, old[`figure-${one.id}`])), ...run.tables.map(table), notes(run.notes)].filter(Boolean));
  };
}

async function foundPage(page, name, values) {
  const found = await ask(name, values);
  page.append(el("h1", {}, found.title), el("p", { className: "finding" }, found.finding || ""));
  if (name === "comparison") page.append(el("p", {}, el("a", { href: `report/${values.path.split("/").map(encodeURIComponent).join("/")}`, target: "_blank" }, button("Report", () => {}))));
  page.append(...[...found.figures.map(one => figure(one)), ...found.tables.map(table), notes(found.notes)].filter(Boolean));
}

// ------------------------------------------------------------------------------------------------------------- new run

const OFTEN = ["method", "model.name", "data.source", "data.clients", "federation.rounds", "training.local_epochs", "training.lr", "lora.r", "seed"];

async function newPage(page, kind, from) {
  const { sections, starts } = await ask("fields"), inputs = {};
  const settings = sections.flatMap(section => section.fields), byKey = Object.fromEntries(settings.map(one => [one.key, one]));
  const values = () => Object.fromEntries(Object.entries(inputs).filter(([, input]) => input.value.trim()).map(([key, input]) => [key, input.value.trim()]));

  const field = about => {
    const usual = about.default === "" ? "" : `default: ${about.default}`;
    let input;
    if (about.choices.length || about.type === "boolean") {
      const choices = about.type === "boolean" ? ["true", "false"] : about.choices;
      input = el("select", {}, el("option", { value: "" }, usual || "not given"), choices.map(one => el("option", { value: one }, one)));
    } else {
      const numeric = about.type === "number" || about.type === "integer";
      input = el("input", { type: numeric ? "number" : "text", placeholder: usual, autocomplete: "off" });
      if (numeric) input.step = about.type === "integer" ? "1" : "any";
      if (about.least !== null) input.min = about.least;
      if (about.most !== null) input.max = about.most;
      if (about.names.length) input.setAttribute("list", `names-${about.key}`);
    }
    input.id = `set-${about.key}`;
    inputs[about.key] = input;
    const ends = [["least", "≥", ">", "Minimum"], ["most", "≤", "<", "Maximum"]].filter(([end]) => about[end] !== null)
      .map(([end, closed, open, word]) => `${about.open.includes(word) ? open : closed} ${about[end]}`);
    const words = [about.help, [about.type === "array" ? "list, with commas" : "", ...ends].filter(Boolean).join(", ")].filter(Boolean).join("; ");
    const box = el("div", { className: "field" }, el("label", { htmlFor: input.id }, about.key), input, el("small", {}, words),
      about.names.length ? el("datalist", { id: `names-${about.key}` }, about.names.map(one => el("option", { value: one }))) : null);
    input.addEventListener("input", () => box.classList.toggle("set", input.value.trim() !== ""));
    return box;
  };

  const often = el("div", { className: "fields" }, OFTEN.map(key => field(byKey[key])));
  const groups = sections.map(section => {
    const mine = section.fields.filter(one => !OFTEN.includes(one.key)).map(field);
    return mine.length ? el("details", {}, el("summary", {}, section.name || "run", " ", el("small", {}, section.about)), el("div", { className: "fields" }, mine)) : null;
  });
  const name = el("input", { placeholder: "chosen for you", autocomplete: "off", id: "run-name" });
  const methods = el("input", { placeholder: "for a comparison: local,fedit,fedalt", autocomplete: "off", id: "run-methods" });
  const seeds = el("input", { placeholder: "for a comparison: 0,1,2", autocomplete: "off", id: "run-seeds" });
  const fill = async (which, what) => {
    const given = await ask("filled", { kind: which, name: what });
    for (const [key, input] of Object.entries(inputs)) {
      input.value = given[key] === undefined ? "" : given[key];
      input.dispatchEvent(new Event("input"));
    }
    for (const group of groups.filter(Boolean)) group.open = Boolean(group.querySelector(".field.set"));
  };
  const source = el("select", { id: "run-from", onchange: () => source.value && fill(...JSON.parse(source.value)).catch(complain) },
    el("option", { value: "" }, "the defaults"), Object.entries(starts).map(([which, names]) =>
      el("optgroup", { label: `${which}s` }, names.map(one => el("option", { value: JSON.stringify([which, one]) }, one)))));
  const search = el("input", { type: "search", placeholder: "find a setting", oninput: () => {
    const wanted = search.value.toLowerCase();
    for (const group of groups.filter(Boolean)) {
      for (const one of group.querySelectorAll(".field")) one.hidden = !one.textContent.toLowerCase().includes(wanted);
      group.open = wanted !== "" && Boolean(group.querySelector(".field:not([hidden])"));
    }
  } });
  const valid = () => {
    const wrong = Object.values(inputs).find(input => !input.checkValidity());
    if (wrong) {
      for (let at = wrong; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
      throw new Error(`${wrong.id.slice(4)}: ${wrong.validationMessage}`);
    }
  };
  const told = el("div", { id: "estimate" });
  const estimate = button("Check and estimate", async () => {
    valid();
    told.replaceChildren(el("p", { className: "pending" }, "takes the largest step and some others"));
    try {
      const found = await post("estimate", { values: values() }), cost = found.estimate;
      const memory = Object.entries(cost.peak_memory).map(([where, size]) => `${where} ${number(size / 1e9, 2)} GB`).join(", ");
      told.replaceChildren(el("div", { className: "facts" }, [["training", span(cost.seconds)], ["scoring, at most", span(cost.scoring_seconds)],
        ["memory", memory], ["uploads of a round", `${number(cost.bytes_up / 1e6, 2)} MB`], ["steps", String(cost.steps)], ["clients at a time", String(cost.cohort)]]
        .map(([what, value]) => el("div", {}, el("span", {}, what), el("b", {}, value)))), el("ul", {}, found.notes.map(note => el("li", {}, note))));
    } catch (error) { told.replaceChildren(el("p", { className: "error" }, error.message)); }
  });
  const start = button("Start", async () => {
    valid();
    const made = await post("start", { name: name.value.trim(), values: values(), methods: methods.value.trim(), seeds: seeds.value.trim() });
    location.hash = methods.value.trim() || seeds.value.trim() ? "#/" : link("run", made.path);
  }, "main");
  const labelled = (text, input, help) => el("div", { className: "field" }, el("label", { htmlFor: input.id }, text), input, help && el("small", {}, help));
  page.append(el("h1", {}, "New run"), el("div", { className: "split" },
    el("div", {}, el("div", { className: "fields" }, labelled("begin with", source), labelled("name", name, "a new folder among the runs")), el("h2", {}, "Used most"), often,
      el("details", {}, el("summary", {}, "Compare several methods or seeds"), el("div", { className: "fields" }, labelled("methods", methods), labelled("seeds", seeds))),
      el("h2", {}, "All settings"), search, groups.filter(Boolean)),
    el("div", { className: "side" }, start, estimate, told)));
  if (kind) await fill(kind, from);
}

// ---------------------------------------------------------------------------------------------------------------- chat

function shaded(alpha, slot) {
  const widest = Math.max(...alpha.map(([, weight]) => Math.abs(weight - 0.5))) || 0.5;
  const tokens = alpha.map(([text, weight]) => {
    const made = el("span", { className: weight >= 0.5 ? "own" : "others", title: `${slot} LoRA: ${weight.toFixed(3)}` }, text);
    made.style.setProperty("--a", (0.75 * Math.abs(weight - 0.5) / widest).toFixed(2));
    return made;
  });
  return [el("div", { className: "tokens" }, tokens), el("p", { className: "about" }, `Blue: the ${slot} LoRA weighs more than a half; orange: less; strongest colour: ${(0.5 + widest).toFixed(2)} or ${(0.5 - widest).toFixed(2)}.`)];
}

async function chatPage(page, path) {
  const run = await ask("run", { path });
  const ticks = (run.clients || []).map((client, i) => el("input", { type: "checkbox", value: client, checked: i < 2, id: `client-${client}` }));
  const base = el("input", { type: "checkbox", checked: true, id: "base" }), prompt = el("textarea", { "aria-label": "prompt", placeholder: "an instruction" });
  const temperature = el("input", { type: "number", min: 0, step: "any", placeholder: "temperature: 0", "aria-label": "temperature" });
  const longest = el("input", { type: "number", min: 1, placeholder: "longest answer", "aria-label": "longest answer, in tokens" });
  const answers = el("div", { className: "columns" });
  const send = button("Ask", async () => {
    const clients = ticks.filter(tick => tick.checked).map(tick => Number(tick.value)), places = new Map();
    if (!prompt.value.trim()) throw new Error("write an instruction first");
    answers.replaceChildren(...[...clients, ...(base.checked ? [null] : [])].map(who => {
      const text = el("p", { className: "pending" }), more = el("div");
      places.set(who, { text, more });
      return el("div", { className: "answer" }, el("h3", {}, who === null ? "the base alone" : `client ${who}`), text, more);
    }));
    const body = { path, clients, base: base.checked, prompt: prompt.value, temperature: temperature.value, longest: longest.value };
    const answer = await fetch("api/chat", { method: "POST", body: JSON.stringify(body) });
    if (!answer.ok) throw new Error((await answer.json()).error);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines.map(JSON.parse)) {
        if (line.error) throw new Error(line.error);
        const { text, more } = places.get(line.who);
        if (line.piece !== undefined) { text.append(line.piece); continue; }
        text.textContent = line.text || "(nothing)";
        text.className = "";
        if (line.chances.length) more.append(el("p", { className: "about" }, line.chances.map(([name, chance]) => `${name} ${chance.toFixed(3)}`).join(", ")));
        if (line.alpha.length) more.append(...shaded(line.alpha, line.slots[0]));
      }
    }
  }, "main");
  prompt.addEventListener("keydown", event => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send.click(); });
  const tasks = Object.fromEntries((run.tables || []).slice(0, 1).flatMap(one => one.rows).map(row => [row[0], row[1]]));
  const tick = (input, text) => el("label", { htmlFor: input.id }, input, ` ${text}`);
  page.append(el("h1", {}, "Chat"), el("p", { className: "about" }, "Clients of ", el("a", { href: link("run", path) }, path)),
    el("div", { className: "ticks" }, ticks.map(one => tick(one, `${one.value} ${tasks[one.value] || ""}`)), tick(base, "the base alone")),
    prompt, el("p", {}, send, temperature, " ", longest), answers);
}

// --------------------------------------------------------------------------------------------------------------- pages

const PAGES = {
  "": listPage, run: runPage, new: newPage, chat: chatPage,
  comparison: (page, path) => foundPage(page, "comparison", { path }),
  compare: (page, ...paths) => foundPage(page, "side_by_side", { paths: JSON.stringify(paths) }),
};

async function open() {
  const mine = ++shown, page = el("div");
  clearTimeout(timer);
  complain(null);
  main.replaceChildren(page);
  const [name, ...parts] = location.hash.replace(/^#\//, "").split("/").map(decodeURIComponent);
  try {
    const refresh = await (PAGES[name] || listPage)(page, ...parts);
    let lost = false;
    const again = async () => {
      if (mine !== shown) return;
      try {
        if (!document.hidden) await refresh();
        if (lost) complain(null);
        lost = false;
      } catch (error) {
        complain(error);
        lost = true;
      }
      if (mine === shown) timer = setTimeout(again, 2000);
    };
    if (refresh) await again();
  } catch (error) { complain(error); }
  document.body.dataset.ready = location.hash;
}
window.addEventListener("hashchange", open);
open();
