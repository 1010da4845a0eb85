// A host in Node: starts train_lora.py, shows what it says, stops it gently, catches up.
// Needs Node 18 or newer, and no package.
//
//     node host.mjs CONFIG [further arguments of train_lora.py]
//     node host.mjs --attach OUTPUT_PATH      # follow a run that another process started
//
// The duties of a host that it shows: read stdout as JSON lines, and let no unknown line, type or
// field do harm; read stderr as well, as a full pipe would block the trainer; stop by one SIGTERM
// and wait for the last line; take a stream without one for a run that was killed; catch up from
// events.jsonl, where a `start` takes back what was said of steps after its `resumed_step`, as those
// are made again (a chart has to forget them). A host that dies closes the pipe, and the trainer
// saves and ends. To outlive its host, a run needs a stdout that stays, such as a file or a
// container's log; --attach follows it.

import { spawn, spawnSync } from "node:child_process";
import { once } from "node:events";
import fs from "node:fs";
import { constants } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";

const WINDOWS = process.platform === "win32";
const HERE = fileURLToPath(new URL(".", import.meta.url));
const TRAINER = process.env.TRAIN_LORA ?? join(HERE, "../../train_lora.py");
const PYTHON = process.env.TRAIN_LORA_PYTHON ?? (WINDOWS ? "python" : "python3");
const PATIENCE_MS = 30_000; // the trainer promises to end within 8 seconds
const LAST = ["complete", "interrupted", "error"];

// A value in words: null means that it is not known.
function word(value) {
  return typeof value === "number" ? Math.round(value * 1000) / 1000 : (value ?? "?");
}

const DESCRIBE = {
  start: (e) => `Start: ${e.message}, process ${e.pid}`,
  progress: (e) =>
    `${e.percent} %  step ${e.step}/${e.total_steps}` +
    `  loss ${word(e.loss)}  ${word(e.eta_seconds)} s left`,
  warning: (e) => `Warning ${e.code}: ${e.message}`,
  sample: (e) => `Sample: ${e.image_path}`,
  checkpoint: (e) => `Checkpoint: ${e.path}`,
  complete: (e) => `Complete: ${e.final_path}`,
  interrupted: (e) => `Interrupted by ${e.reason} at step ${e.step}, saved: ${word(e.path)}`,
  error: describeError,
};

function describeError(e) {
  const all = e.problems?.map((p) => `${p.path}: expected ${p.expected}, got ${p.found}. ${p.hint}`);
  // Of a wrong config, the message repeats the first problem.
  const said = all?.length && e.message?.endsWith(all[0]) ? "" : `: ${e.message}`;
  return [`Error ${e.code}${said}`, ...(all?.length ? all : [e.hint])].join("\n  ");
}

// What a person sees of a run, and how its latest start ended.
const view = { last: null, start: null, refused: false };

function see(line) {
  let event;
  try {
    event = JSON.parse(line);
  } catch {
    return; // what is no event does no harm
  }
  if (typeof event?.type !== "string") return;
  if (event.type === "start") {
    view.last = null; // after an earlier last line: then that was not the end
    view.start = event;
    view.refused = !String(event.protocol).startsWith("1.");
    if (view.refused) show(`Protocol ${event.protocol} is unknown; this host speaks 1.x`);
  }
  const valid = event.type === "info" && event.topic === "valid";
  if (LAST.includes(event.type) || valid) view.last = event;
  const known = Object.hasOwn(DESCRIBE, event.type);
  show(known ? DESCRIBE[event.type](event) : String(event.message), event.type === "progress");
}

// Print; on a terminal the next text takes the place of a passing one.
function show(text, passing = false) {
  // A file name may hold what moves the cursor.
  const clean = text.replace(/[\x00-\x09\x0b-\x1f\x7f-\x9f]/g, "?");
  const terminal = process.stdout.isTTY;
  process.stdout.write((terminal ? "\r\x1b[K" : "") + clean + (passing && terminal ? "" : "\n"));
}

let stopWanted = () => {}; // what a stop means depends on who started the run
let asked = false;

// Ask once, by a signal or by the file `stop`, however often a person presses Ctrl-C.
function stopOnce(ask) {
  if (asked) return;
  asked = true;
  show("Stopping: the trainer saves and ends within 8 seconds.");
  ask();
}

function leaveStopFile(output) {
  fs.closeSync(fs.openSync(join(output, "stop"), "a"));
}

// Start the trainer, follow it to its end and return its exit code.
async function run(config, further) {
  // Ctrl-C reaches the whole group of a terminal. In a group of its own (detached) the trainer
  // hears of it from us alone, and once: a second signal, a second later, would end it at once.
  const options = { stdio: ["ignore", "pipe", "pipe"], detached: !WINDOWS, windowsHide: true };
  const child = spawn(PYTHON, [TRAINER, "--config", config, ...further], options);
  const ended = once(child, "close"); // rejects where there is no such program
  let complaints = "";
  child.stderr.setEncoding("utf8").on("data", (text) => {
    complaints = (complaints + text).slice(-4000);
  });
  stopWanted = () =>
    stopOnce(() => {
      // On Windows, Node's kill() is no request but the end. The stop file is one everywhere.
      if (!WINDOWS) child.kill("SIGTERM");
      else if (view.start) leaveStopFile(view.start.config.output_path);
      else child.kill(); // nothing has begun that could be lost
      // The last resort: costs all updates since the last checkpoint.
      setTimeout(() => child.kill("SIGKILL"), PATIENCE_MS).unref();
    });
  createInterface({ input: child.stdout }).on("line", (line) => {
    see(line);
    if (view.refused) stopWanted();
  });
  const [code, signal] = await ended;
  if (!view.last) {
    show(signal ? `Killed by signal ${constants.signals[signal]}` : `No last line, code ${code}`);
    process.stderr.write(complaints);
  }
  return code ?? 128 + constants.signals[signal];
}

// Replay what a run has said, follow it to its end, and return the code it ended with.
async function attach(output) {
  const newLines = lineReader(join(output, "events.jsonl"));
  stopWanted = () => stopOnce(() => leaveStopFile(output)); // works where the pid means nothing
  for (;;) {
    const alive = isAlive(output); // before reading, as the last line comes before the lock goes
    newLines().forEach(see);
    if (view.refused || !alive) return view.refused ? 1 : endOf(view.last);
    await sleep(300);
  }
}

// Return a function that reads the lines that are new. A torn one has to wait for its end, and is
// read from its beginning then: if it never gets one, a restart puts another line in its place.
// --fresh moves the file away, which Windows could not do if it were kept open: begin anew.
function lineReader(path) {
  let [inode, position] = [0, 0];
  return () => {
    if (!fs.existsSync(path)) return []; // for a moment there is none
    const file = fs.openSync(path);
    const { ino, size } = fs.fstatSync(file);
    if (ino !== inode || size < position) [inode, position] = [ino, 0];
    const bytes = Buffer.alloc(size - position);
    const read = fs.readSync(file, bytes, 0, bytes.length, position);
    fs.closeSync(file);
    const lines = bytes.toString("latin1", 0, read).split("\n"); // events are ASCII
    position += read - lines.pop().length;
    return lines;
  };
}

// Tell whether a run holds its lock, which the system takes back however the run ends. The pid in
// `start` says less: by now it may belong to another process. Node cannot lock files, Python can.
const PROBE = `
import sys
try:
    with open(sys.argv[1], "rb") as lock:
        if sys.platform == "win32":
            import msvcrt
            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
except FileNotFoundError:
    pass
except (BlockingIOError, PermissionError):
    sys.exit(9)
`;
function isAlive(output) {
  return spawnSync(PYTHON, ["-I", "-S", "-c", PROBE, join(output, ".lock")]).status === 9;
}

// Derive the exit code from the last line; without one, the run was killed.
function endOf(last) {
  if (!last) show("Killed: no last line, and nobody holds the lock");
  if (last?.type === "interrupted") return { SIGINT: 130, SIGHUP: 129 }[last.reason] ?? 143;
  return last ? Number(last.type === "error") : 128 + 9;
}

for (const name of ["SIGINT", "SIGTERM"]) process.on(name, () => stopWanted());
const [first, ...further] = process.argv.slice(2);
const attaching = first === "--attach" && further.length === 1;
if (attaching && fs.existsSync(join(further[0], "events.jsonl"))) {
  process.exitCode = await attach(further[0]);
} else if (first && first !== "--attach") {
  process.exitCode = await run(first, further);
} else {
  console.error("Usage: host.mjs CONFIG [ARGUMENT ...] | --attach OUTPUT_PATH (of a run)");
  process.exitCode = 2;
}
