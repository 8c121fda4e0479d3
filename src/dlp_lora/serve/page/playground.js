// The playground: a chat whose text is coloured by the adapter that wrote it.

import { Refusal, byId, call, element, events, hasKey, setKey } from "./api.js";

const CHAT = "dlp-lora-chat";
const NUM_COLOURS = 10;
const MIXTURE = "a mixture"; // no model is called so: there is a space in it
const NUM_SHOWN = 5; // of the sentences that an adapter has written

const state = { model: "", adapters: [], turns: [], running: null };

const colourOf = (name) => (name ? `c${Math.max(state.adapters.indexOf(name), 0) % NUM_COLOURS}` : "cbase");
const heaviest = (mixture) => Object.entries(mixture).sort((a, b) => b[1] - a[1])[0]?.[0] ?? "";
const percent = (x) => `${Math.round(x * 100)}\u00a0%`;

function labelOf(sentence) {
  const names = Object.entries(sentence.mixture).sort((a, b) => b[1] - a[1]);
  if (!names.length) return sentence.abstained ? "base: none fits" : "base";
  if (names.length === 1 && names[0][1] === 1) return names[0][0];
  return names.map(([name, weight]) => `${name} ${percent(weight)}`).join(" + ");
}

// One answer: its sentences as they come, and how each was routed.
class Answer {
  constructor(model, { sentences = [], note = "" } = {}) {
    this.model = model;
    this.sentences = sentences;
    this.said = element("div", { classes: "said" });
    this.routing = element("ol", { classes: "routing" });
    this.note = element("p", { classes: "note", text: note });
    this.details = element("details", {}, element("summary", { text: "How it was routed" }), this.routing);
    this.element = element("div", { classes: "answer" }, element("h3", { text: model }), this.said, this.note, this.details);
    this.nodes = [];
    for (const sentence of sentences) this.show(sentence);
    this.tell();
  }

  get text() {
    return this.sentences.map((sentence) => sentence.text).join("");
  }

  begin(told) {
    const sentence = { ...told, text: "" };
    this.sentences.push(sentence);
    this.show(sentence);
    this.tell();
  }

  show(sentence) {
    const colour = colourOf(heaviest(sentence.mixture));
    const before = this.sentences[this.sentences.indexOf(sentence) - 1];
    const written = element("span", { classes: `text ${colour}`, text: sentence.text });
    const shown = element("span", { classes: "sentence" });
    // A label where the colour changes, and at the beginning.
    if (!before || labelOf(before) !== labelOf(sentence)) {
      shown.append(element("span", { classes: `label ${colour}`, text: labelOf(sentence) }));
    }
    shown.append(written);
    this.said.append(shown);
    this.nodes.push(written.firstChild);
  }

  add(text) {
    if (!text) return;
    if (!this.sentences.length) this.begin({ mixture: {}, probabilities: {}, switched: false, abstained: false, route_ms: 0 });
    this.sentences.at(-1).text += text;
    this.nodes.at(-1).appendData(text);
  }

  end(trace) {
    for (const [i, told] of trace.entries()) Object.assign(this.sentences[i] ?? {}, { ...told, text: this.sentences[i]?.text });
    this.tell();
  }

  tell() {
    this.routing.replaceChildren(...this.sentences.map((sentence, i) => routingOf(sentence, i)));
    this.details.hidden = !this.sentences.length;
  }
}

function routingOf(sentence, i) {
  const colour = colourOf(heaviest(sentence.mixture));
  const head = element("div", {}, element("span", { classes: `label ${colour}`, text: `${i + 1}: ${labelOf(sentence)}` }));
  const marks = [];
  if (sentence.switched) marks.push("switched here");
  if (sentence.abstained) marks.push("no adapter fits");
  head.append(marks.join(", "));
  const list = element("dl");
  for (const [name, p] of Object.entries(sentence.probabilities).sort((a, b) => b[1] - a[1]).slice(0, NUM_SHOWN)) {
    const weight = sentence.mixture[name];
    list.append(
      element("dt", { text: name, classes: colourOf(name) }),
      element("dd", {}, element("meter", { value: p, min: 0, max: 1, ariaLabel: `probability of ${name}: ${percent(p)}` })),
      element("dd", { text: weight === undefined ? percent(p) : `${percent(p)}, weight ${percent(weight)}` }),
    );
  }
  const costs = [`route ${sentence.route_ms.toFixed(1)} ms`];
  if (sentence.fuse_ms !== undefined) costs.push(`fuse ${sentence.fuse_ms.toFixed(1)} ms`);
  if (sentence.encode_ms) costs.push(`encode the context again ${sentence.encode_ms.toFixed(1)} ms`);
  const asked = Object.keys(sentence.probabilities).length ? [list] : [element("div", { text: "fixed: no router was asked", classes: "note" })];
  return element("li", {}, head, ...asked, element("div", { classes: "note", text: costs.join(" · ") }));
}

function showTurn(turn) {
  const shown = element("div", { classes: `turn ${turn.role}` });
  if (turn.role === "user") {
    shown.append(element("h3", { text: "You" }), element("div", { classes: "said", text: turn.text }));
  } else {
    turn.views = turn.answers.map((answer) => new Answer(answer.model, answer));
    shown.append(element("div", { classes: "answers" }, ...turn.views.map((view) => view.element)));
  }
  byId("log").append(shown);
  return shown;
}

// What a reload brings back.
function keep() {
  const plain = ({ role, text, answers }) => ({ role, text, answers });
  try {
    sessionStorage.setItem(CHAT, JSON.stringify(state.turns.map(plain)));
  } catch {
    // The tab's storage is full: the chat is lost with a reload, and works until then.
  }
}

function showAdapters() {
  const written = new Map(["", ...state.adapters].map((name) => [name, []]));
  for (const turn of state.turns) {
    for (const sentence of (turn.answers ?? []).flatMap((answer) => answer.sentences)) {
      const names = Object.keys(sentence.mixture);
      for (const name of names.length ? names : [""]) written.get(name)?.push(sentence.text.trim());
    }
  }
  const items = [...written].map(([name, texts]) => {
    const label = element("span", { classes: `label ${colourOf(name)}`, text: name || "base" });
    const count = texts.length === 1 ? "1 sentence" : `${texts.length} sentences`;
    const last = texts.filter(Boolean).slice(-NUM_SHOWN).map((text) => element("li", { text }));
    return element("li", {}, label, ` ${count}`, element("ol", { reversed: true }, ...last.reverse()));
  });
  byId("adapters").replaceChildren(...items);
}

function say(text, isError = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("error", isError);
}

async function read(view, answer, body, signal) {
  const started = performance.now();
  let first = 0, tokens = 0;
  view.element.classList.add("running");
  try {
    const options = { stream_options: { include_usage: true }, stream: true };
    const response = await call("/v1/chat/completions", { body: { ...body, ...options, model: view.model }, signal });
    for await (const event of events(response)) {
      tokens = event.usage?.completion_tokens ?? tokens;
      for (const choice of event.choices) {
        if (choice.dlp?.trace) view.end(choice.dlp.trace);
        else if (choice.dlp) view.begin(choice.dlp);
        if (choice.delta.content && !first) first = performance.now() - started;
        view.add(choice.delta.content);
      }
    }
    const seconds = (performance.now() - started) / 1000;
    answer.note = `${tokens} tokens, first after ${Math.round(first)} ms, ${(tokens / seconds).toFixed(1)} tokens/s`;
  } catch (error) {
    answer.note = error.name === "AbortError" ? "stopped" : error.message;
    if (error instanceof Refusal && error.status === 401) askForKey({ isWrong: hasKey() });
    if (error.name !== "AbortError") say(error.message, true);
  } finally {
    view.element.classList.remove("running");
    view.note.textContent = answer.note;
    answer.sentences = view.sentences;
    view.tell();
    showAdapters();
    keep();
  }
}

async function send(text) {
  const beside = byId("beside").value === MIXTURE ? byId("mixture").value.trim() : byId("beside").value;
  if (byId("beside").value === MIXTURE && !beside) {
    say("Write a mixture, as math=0.6,units=0.4.", true);
    byId("mixture").focus();
    return;
  }
  const question = { role: "user", text };
  state.turns.push(question);
  const messages = state.turns
    .map((turn) => ({ role: turn.role, content: turn.text ?? textOf(turn.answers[0]) }))
    .filter((message) => message.content);
  const turn = { role: "assistant", answers: [state.model, beside].filter(Boolean).map((model) => ({ model, sentences: [], note: "" })) };
  state.turns.push(turn);
  showTurn(question);
  showTurn(turn).scrollIntoView({ block: "end" });
  byId("prompt").value = "";
  state.running = new AbortController();
  setRunning(true);
  say("Answering …");
  const body = { messages, max_tokens: Number(byId("max-tokens").value), temperature: Number(byId("temperature").value) };
  await Promise.all(turn.views.map((view, i) => read(view, turn.answers[i], body, state.running.signal)));
  setRunning(false);
  if (!byId("status").classList.contains("error")) say("");
  byId("prompt").focus();
}

const textOf = (answer) => answer.sentences.map((sentence) => sentence.text).join("");

function setRunning(isRunning) {
  byId("send").disabled = isRunning;
  byId("stop").hidden = !isRunning;
}

function askForKey({ isWrong = false } = {}) {
  byId("set-key").hidden = false;
  byId("key-status").textContent = isWrong ? "The key is wrong." : "";
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
}

async function start() {
  try {
    const { data } = await (await call("/v1/models")).json();
    state.model = data.find((model) => model.parent === null).id;
    state.adapters = data.map((model) => model.id).filter((id) => id !== state.model && id !== `${state.model}:base`);
  } catch (error) {
    if (error instanceof Refusal && error.status === 401) askForKey({ isWrong: hasKey() });
    say(error.message, true);
    return;
  }
  byId("model").textContent = state.model;
  byId("set-key").hidden = !hasKey();
  const choices = ["", `${state.model}:base`, ...state.adapters, MIXTURE];
  byId("beside").replaceChildren(
    ...choices.map((value) => element("option", { value, text: value === `${state.model}:base` ? "the base model" : value || "nothing else" })),
  );
  byId("log").replaceChildren();
  state.turns = JSON.parse(sessionStorage.getItem(CHAT) ?? "[]");
  state.turns.forEach(showTurn);
  showAdapters();
  say("");
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = byId("prompt").value.trim();
  if (text && state.model && byId("stop").hidden) send(text);
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("composer").requestSubmit();
});
byId("beside").addEventListener("change", () => {
  byId("mixture-label").hidden = byId("beside").value !== MIXTURE;
});
byId("stop").addEventListener("click", () => state.running.abort());
byId("clear").addEventListener("click", () => {
  state.turns = []; // before the running answer ends, which keeps the turns
  state.running?.abort();
  sessionStorage.removeItem(CHAT);
  start();
  byId("prompt").focus();
});
byId("set-key").addEventListener("click", () => askForKey());
byId("key-form").addEventListener("submit", () => {
  setKey(byId("key").value);
  byId("key").value = "";
  start();
});

start();
