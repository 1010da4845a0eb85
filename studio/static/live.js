// What pages that change have in common: one stream that survives, and parts that are replaced.

const WATCHDOG = 30_000; // without any event: the server sends one every 10 s
const HIDDEN = 60_000; // a page nobody looks at gives its connection back
const SAY_SO = 3_000; // a short break is nobody's business
const AGAIN = 3_000;

// Listens to /events and calls handlers.snapshot, .trainer, .state and .end with what they carry.
// The address always names the last line heard, so that a new connection leaves nothing out.
export function listen(job, after, handlers) {
  const banner = document.getElementById("banner");
  let source = null;
  let heard = after;
  let ended = false;
  let watchdog, hiding, saying, retrying;
  // A browser has six connections to a host, for all tabs together: one that is hidden gives its
  // own to one that is seen.
  const tabs = new BroadcastChannel("streams");
  tabs.onmessage = () => document.hidden && close();

  function open() {
    clearTimeout(retrying);
    if (ended) return;
    source?.close();
    tabs.postMessage("opened");
    const asked = new URLSearchParams();
    if (job) asked.set("job", job);
    if (job && heard) asked.set("after", heard);
    source = new EventSource(`/events?${asked}`);
    source.onopen = () => calm();
    source.onerror = () => {
      worry();
      // While it is CONNECTING the browser tries again by itself; a refusal ends that.
      if (source?.readyState === EventSource.CLOSED) retrying = setTimeout(open, AGAIN);
    };
    for (const name of ["snapshot", "trainer", "state", "ping", "end"])
      source.addEventListener(name, (event) => take(name, event));
    watch();
  }

  function take(name, event) {
    calm();
    watch();
    if (event.lastEventId) heard = event.lastEventId;
    if (name === "end") {
      ended = true;
      close();
    }
    if (event.data) handlers[name]?.(JSON.parse(event.data), event.lastEventId);
  }

  function close() {
    clearTimeout(watchdog);
    clearTimeout(retrying);
    source?.close();
    source = null;
  }

  function watch() {
    clearTimeout(watchdog);
    watchdog = setTimeout(open, WATCHDOG);
  }

  function worry() {
    saying ??= setTimeout(() => {
      banner.textContent = "No connection to the studio. Training goes on; this page catches up by itself.";
      banner.hidden = false;
    }, SAY_SO);
  }

  function calm() {
    clearTimeout(saying);
    saying = undefined;
    banner.hidden = true;
  }

  document.addEventListener("visibilitychange", () => {
    clearTimeout(hiding);
    if (document.hidden) hiding = setTimeout(close, HIDDEN);
    else if (!source) open();
  });
  // A connection over a network that is gone says nothing for long: a new one fails, or works, at once.
  for (const change of ["offline", "online"]) addEventListener(change, () => source && open());
  addEventListener("pagehide", close);
  addEventListener("pageshow", (event) => event.persisted && open());
  if (!document.hidden) open();
}

// Replaces the elements of this page that the server has sent anew, known by their ids.
export function patch(html) {
  const fresh = new DOMParser().parseFromString(html, "text/html");
  for (const part of fresh.querySelectorAll("body > [id]")) {
    const old = document.getElementById(part.id);
    if (!old || old.isEqualNode(part)) continue;
    const active = old.contains(document.activeElement) ? document.activeElement : null;
    if (active?.matches("input, select, textarea")) continue; // someone is writing
    keepPictures(old, part);
    old.replaceWith(document.adoptNode(part));
    if (active) refocus(part, active);
  }
}

// Takes over the links that are there: their pictures are loaded, and one may have the focus.
function keepPictures(old, part) {
  const there = new Map([...old.querySelectorAll("a:has(img)")].map((link) => [link.href, link]));
  for (const link of part.querySelectorAll("a:has(img)")) {
    const same = there.get(link.href);
    if (same) link.replaceWith(same);
  }
}

function refocus(part, active) {
  const wanted = active.textContent.trim();
  const controls = [...part.querySelectorAll("button:enabled, a[href]")];
  if (active.isConnected && part.contains(active)) active.focus();
  else (controls.find((each) => each.textContent.trim() === wanted) ?? controls[0])?.focus();
}

// Fetches a part of the page and puts it in place; several calls in a row make one request.
export function refresher(address, pause) {
  let waiting = null;
  let last = 0;
  return () => {
    if (waiting) return;
    waiting = setTimeout(async () => {
      last = Date.now();
      waiting = null;
      try {
        const answer = await fetch(address, { headers: { Accept: "text/html" } });
        if (answer.ok) patch(await answer.text());
      } catch {
        // The stream notices the same, and says so.
      }
    }, Math.max(0, last + pause - Date.now()));
  };
}

// Shows how far a run is where tabs are: in the title and as a ring in the icon.
export function showInTab(name, percent) {
  document.title = percent === null ? `${name} · LoRA Studio` : `${percent} % · ${name} · LoRA Studio`;
  const icon = document.querySelector("link[rel=icon]");
  if (percent === null || percent >= 100) {
    icon.href = "/static/icon.svg";
    return;
  }
  const canvas = Object.assign(document.createElement("canvas"), { width: 32, height: 32 });
  const pen = canvas.getContext("2d");
  pen.lineWidth = 6;
  for (const [share, colour] of [[1, "#9aa4b2"], [percent / 100, "#2f6fd0"]]) {
    pen.strokeStyle = colour;
    pen.beginPath();
    pen.arc(16, 16, 12, -Math.PI / 2, -Math.PI / 2 + share * 2 * Math.PI);
    pen.stroke();
  }
  canvas.toBlob((blob) => {
    const before = icon.href;
    icon.href = URL.createObjectURL(blob);
    if (before.startsWith("blob:")) URL.revokeObjectURL(before);
  });
}
