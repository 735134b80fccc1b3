// Keeps a page up to date: asks for it again, and changes what has changed in place.
//
// Rule 1: the server draws; this only moves nodes. Text never becomes markup here.
// Rule 2: what the reader is at stays: focus, scrolling, opened details, and everything in [data-keep].
// Rule 3: what may come and go has an id, so that its neighbours stay who they are.
// Rule 4: nothing is asked for while nobody looks, and one question is open at a time.

const main = document.getElementById("main");
const notice = document.getElementById("notice");
const toggle = document.getElementById("live");
const RETRY_S = 5;
let timer = null;
let asking = false;
let isLive = Boolean(main.dataset.refreshS);

function say(text) {
  if (notice.textContent !== text) notice.textContent = text;
  notice.hidden = !text;
}

function keyOf(node) {
  return node.nodeType === Node.ELEMENT_NODE && node.id ? node.id : null;
}

function isAlike(a, b) {
  return a.nodeType === b.nodeType && a.nodeName === b.nodeName && keyOf(a) === keyOf(b);
}

// Makes `old` like `fresh`, with as few changes as it takes.
export function morph(old, fresh) {
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  if (old.hasAttribute("data-keep") || old.isEqualNode(fresh)) return;
  const isDetails = old.nodeName === "DETAILS";
  for (const { name } of [...old.attributes]) {
    if (!fresh.hasAttribute(name) && !(isDetails && name === "open")) old.removeAttribute(name);
  }
  for (const { name, value } of [...fresh.attributes]) {
    if (old.getAttribute(name) !== value && !(isDetails && name === "open")) old.setAttribute(name, value);
  }
  if (old.contains(document.activeElement) && /^(INPUT|SELECT|TEXTAREA)$/.test(old.nodeName)) return;
  const byKey = new Map([...old.children].filter((node) => node.id).map((node) => [node.id, node]));
  const wanted = new Set([...fresh.children].map(keyOf));
  let at = old.firstChild;
  for (const next of [...fresh.childNodes]) {
    const key = keyOf(next);
    let own = key === null ? null : byKey.get(key);
    if (own && own !== at && own.nodeName === next.nodeName) {
      // What stands before it and is not wanted any more goes, so that rows that stay are not moved.
      while (at && at !== own && !(keyOf(at) && wanted.has(keyOf(at)))) {
        const gone = at;
        at = at.nextSibling;
        gone.remove();
      }
      if (own !== at) old.insertBefore(own, at);
    }
    if (!own && at && isAlike(at, next)) own = at;
    if (own && own.nodeName === next.nodeName) {
      if (own === at) at = at.nextSibling;
      morph(own, next);
    } else {
      old.insertBefore(document.importNode(next, true), at);
    }
  }
  while (at) {
    const gone = at;
    at = at.nextSibling;
    gone.remove();
  }
}

export async function refresh() {
  if (asking) return;
  asking = true;
  clearTimeout(timer);
  let inS = Number(main.dataset.refreshS);
  try {
    const url = new URL(location.href);
    url.searchParams.delete("done");
    const response = await fetch(url, { cache: "no-store" });
    if (response.status === 401) {
      location.reload();
      return;
    }
    if (response.status === 404 && main.dataset.gone) {
      say(main.dataset.gone);
      for (const button of main.querySelectorAll(".actions details")) button.remove();
      isLive = false;
      return;
    }
    if (!response.ok) throw new Error(`${response.status}`);
    const fresh = new DOMParser().parseFromString(await response.text(), "text/html").getElementById("main");
    const done = document.getElementById("done");
    if (done) fresh.insertBefore(done.cloneNode(true), fresh.firstElementChild);
    morph(main, fresh);
    document.dispatchEvent(new Event("endmark:drawn"));
    inS = Number(main.dataset.refreshS);
    say("");
  } catch (error) {
    say(`The server does not answer (${error.message}). What you see may be out of date.`);
    inS = RETRY_S;
  } finally {
    asking = false;
    schedule(inS);
  }
}

function schedule(inS) {
  clearTimeout(timer);
  if (isLive && document.visibilityState === "visible") timer = setTimeout(refresh, inS * 1000);
}

if (isLive) {
  toggle.hidden = false;
  toggle.addEventListener("click", () => {
    isLive = !isLive;
    toggle.setAttribute("aria-pressed", String(isLive));
    if (isLive) refresh();
  });
  document.addEventListener("visibilitychange", () => {
    if (isLive && document.visibilityState === "visible") refresh();
  });
  schedule(Number(main.dataset.refreshS));
}
