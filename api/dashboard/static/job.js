// Writes down what a job says while it says it: text, reasoning and tools in the order in which they come.
//
// Rule 1: what the agent said is text, whatever it looks like: it only ever becomes the data of text nodes.
// Rule 2: the events are the truth. What the server has drawn stays until the first of them is there.

import { refresh } from "./live.js";

const MOST = 2_000_000; // characters that a page holds; the entries have them all
const transcript = document.getElementById("transcript");
const tools = new Map(); // the line of each tool, by the id of its call
const calls = new Map(); // the line of each function call for the client, by its index
let block = null; // where text goes on
let pending = ""; // what is not drawn yet
let drawn = 0;
let hasBegun = false;
let isScheduled = false;

function begin() {
  if (hasBegun) return;
  hasBegun = true;
  transcript.replaceChildren();
}

function line(look, text = "") {
  const element = document.createElement("div");
  element.className = look;
  element.append(document.createTextNode(text));
  transcript.append(element);
  return element;
}

function flush() {
  isScheduled = false;
  if (!pending) return;
  const isAtEnd = transcript.scrollHeight - transcript.scrollTop - transcript.clientHeight < 40;
  const room = MOST - drawn;
  if (room > 0) {
    block.firstChild.appendData(pending.slice(0, room));
    drawn += Math.min(room, pending.length);
    if (pending.length >= room) line("end", "There is more than is shown here.");
  }
  pending = "";
  if (isAtEnd) transcript.scrollTop = transcript.scrollHeight;
}

function speak(look, text) {
  if (!block || block.className !== look) {
    flush();
    block = line(look);
  }
  pending += text;
  if (!isScheduled) {
    isScheduled = true;
    requestAnimationFrame(flush);
    setTimeout(flush, 250); // a hidden page draws no frames
  }
}

function interject() {
  flush();
  block = null;
}

function showTool(tool) {
  let element = tools.get(tool.call_id);
  if (!element || tool.call_id === null) {
    interject();
    element = line("tool");
    tools.set(tool.call_id, element);
  }
  element.firstChild.data = `${tool.name}: ${tool.status}${tool.detail ? ` – ${tool.detail}` : ""}`;
}

function showCall(delta) {
  let call = calls.get(delta.index);
  if (!call) {
    interject();
    call = { name: "", given: "", element: line("tool") };
    calls.set(delta.index, call);
  }
  call.name += delta.function?.name ?? "";
  call.given += delta.function?.arguments ?? "";
  call.element.firstChild.data = `for the client: ${call.name}(${call.given})`;
}

function watch() {
  const source = new EventSource(transcript.dataset.events);
  const on = (name, act) =>
    source.addEventListener(name, (event) => {
      if (event.data === undefined) return; // the browser's own `open`: it is connected
      begin();
      act(JSON.parse(event.data));
    });
  on("open", ({ attempt }) => attempt > 1 && line("end", `Attempt ${attempt}`));
  on("delta", ({ text }) => speak("text", text));
  on("reasoning", ({ text }) => speak("reasoning", text));
  on("tool", showTool);
  on("tool_call", showCall);
  on("end", ({ status, finish_reason: reason, error }) => {
    source.close();
    interject();
    line("end", error ? `${status}: ${error.code}` : `${status}: ${reason}`);
    transcript.dataset.ended = status;
    refresh();
  });
  // `error` is also the browser's word for a broken connection, which it makes again by itself, from where it was.
  source.addEventListener("error", () => {
    if (source.readyState === EventSource.CLOSED) refresh();
  });
}

if (transcript) watch();
