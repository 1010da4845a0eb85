#!/usr/bin/env bash
# A host in bash: starts train_lora.py, shows what it says, stops it gently, catches up.
# Needs jq, flock, setsid and GNU tail, as any Linux has them.
#
#     host.sh CONFIG [further arguments of train_lora.py]
#     host.sh --attach OUTPUT_PATH      # follow a run that another process started
#
# The duties of a host that it shows: read stdout as JSON lines, and let no unknown line, type or
# field do harm; never let stderr fill a pipe, as that would block the trainer; stop by one SIGTERM
# and wait for the last line; take a stream without one for a run that was killed; catch up from
# events.jsonl. A view that ends closes the pipe, and the trainer saves and ends. To outlive its
# host, a run needs a stdout that stays, such as a file or a container's log; --attach follows it.
set -u
trainer=${TRAIN_LORA:-$(dirname "${BASH_SOURCE[0]}")/../../train_lora.py}
python=${TRAIN_LORA_PYTHON:-python3}
patience_seconds=30 # the trainer promises to end within 8
killed=137

# Puts events into words. The state is the last line of the latest start, and the exit code tells
# how that ended. An unknown protocol ends the view: a closed pipe stops the trainer.
view='
def word: if type == "number" then . * 1000 | round / 1000 else . // "?" end;
def problem: "\(.path): expected \(.expected), got \(.found). \(.hint)";
def complaint: # of a wrong config, the message repeats the first problem
  [.problems[]? | problem] as $all | (.message // "" | tostring) as $said |
  if $all == [] then "Error \(.code): \($said)", "  \(.hint)"
  elif $said | endswith($all[0]) then "Error \(.code)" else "Error \(.code): \($said)" end,
  ($all[] | "  \(.)");
def describe:
  if   .type == "start"       then "Start: \(.message), process \(.pid)"
  elif .type == "progress"    then "\(.percent) %  step \(.step)/\(.total_steps)" +
                                   "  loss \(.loss | word)  \(.eta_seconds | word) s left"
  elif .type == "warning"     then "Warning \(.code): \(.message)"
  elif .type == "sample"      then "Sample: \(.image_path)"
  elif .type == "checkpoint"  then "Checkpoint: \(.path)"
  elif .type == "complete"    then "Complete: \(.final_path)"
  elif .type == "interrupted" then "Interrupted by \(.reason) at step \(.step)" +
                                   ", saved: \(.path | word)"
  elif .type == "error"       then complaint
  else .message // "" end;
def is_last: IN(.type; "complete", "interrupted", "error")
             or (.type == "info" and .topic == "valid");
def refused: .type == "start" and (.protocol | tostring | startswith("1.") | not);
def code:
  if . == null then $killed
  elif .type == "interrupted" then {"SIGINT": 130, "SIGHUP": 129}[.reason | tostring] // 143
  elif .type == "error" then 1 else 0 end;

foreach ((inputs | fromjson? | objects), null) as $event (null;
  if $event == null then . elif $event.type == "start" then null
  elif $event | is_last then $event else . end;
  if $event == null then code as $code | "" | halt_error($code)
  elif $event | refused then
    "Protocol \($event.protocol) is unknown; this host speaks 1.x", ("" | halt_error(1))
  else $event | describe | tostring | gsub("[\\x00-\\x1f\\x7f-\\x9f]"; "?") end)'
show_events() { jq -nrR --unbuffered --argjson killed "$killed" "$view"; }

# A trap interrupts `wait` before the process has ended; and a signal that arrives just before the
# shell falls asleep in it would be heard only at its end. Between short naps none can be missed.
wait_for() {
  while kill -0 "$1" 2>/dev/null; do sleep 0.2; done
  wait "$1"
}

asked=
stop_once() {
  [ -z "$asked" ] || return
  asked=1
  echo "Stopping: the trainer saves and ends within 8 seconds."
  "$@"
}

# Asks by one SIGTERM: a second one, a second later, would end the trainer at once. SIGKILL is the
# last resort: it costs all updates since the last checkpoint. What waits for that is no child of
# this shell: bash may have reaped the trainer in the trap, and would then wait for any other child.
terminate() {
  kill -TERM "$child" 2>/dev/null
  watchdog=$(
    setsid sh -c 'sleep "$0" && kill -KILL "$1"' "$patience_seconds" "$child" >/dev/null 2>&1 &
    echo $!
  )
}

# Starts the trainer, follows it to its end and returns its exit code.
run() {
  config=$1 watchdog=
  shift
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  mkfifo "$folder/events"
  show_events <"$folder/events" &
  viewer=$!
  # jq holds the pipe when this shell is killed, so the trainer has to look after its parent.
  "$python" "$trainer" --config "$config" --set stop_with_parent=true "$@" \
    </dev/null >"$folder/events" 2>"$folder/stderr" & # a file takes all; a pipe would fill up
  child=$!
  trap 'stop_once terminate' INT TERM
  wait_for "$child" 2>/dev/null # bash would tell of a signal in its own words
  code=$?
  wait_for "$viewer"
  if [ $? -eq "$killed" ]; then
    if [ "$code" -gt 128 ]; then
      echo "Killed by signal $((code - 128))"
    else
      echo "No last line, code $code"
    fi
    tail -n 20 "$folder/stderr" >&2
  fi
  [ -z "$watchdog" ] || kill -- "-$watchdog" "$watchdog" 2>/dev/null
  return "$code"
}

# Waits until nobody holds the lock of a run, which the system takes back however the run ends. The
# pid in `start` says less: by now it may belong to another process.
wait_for_end() {
  while [ -e "$1/.lock" ] && ! flock --shared --nonblock "$1/.lock" true; do sleep 0.3; done
}

# Replays what a run has said, follows it to its end, and returns the code it ended with. `tail -F`
# keeps to the name, as --fresh moves the file away.
attach() {
  output=$1
  wait_for_end "$output" >/dev/null &
  watcher=$!
  tail -n +1 -F --pid="$watcher" "$output/events.jsonl" 2>/dev/null | show_events &
  viewer=$!
  trap 'stop_once touch "$output/stop"' INT TERM # works where the pid means nothing
  wait_for "$viewer"
  code=$?
  [ "$code" -ne "$killed" ] || echo "Killed: no last line, and nobody holds the lock"
  kill "$watcher" 2>/dev/null
  return "$code"
}

# Each job gets a process group of its own: Ctrl-C in a terminal reaches this shell alone.
set -m
if [ $# -eq 2 ] && [ "$1" = --attach ] && [ -f "$2/events.jsonl" ]; then
  attach "$2"
elif [ $# -gt 0 ] && [ "$1" != --attach ]; then
  run "$@"
else
  echo "Usage: host.sh CONFIG [ARGUMENT ...] | --attach OUTPUT_PATH (of a run)" >&2
  exit 2
fi
