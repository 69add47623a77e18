#!/usr/bin/env bash
# Starts samft.train on all GPUs of this machine, or of several; installs samft first if needed.
set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
VENV=${SAMFT_VENV:-$REPO/.venv}

usage() {
    cat <<'USAGE'
usage: bash launch.sh [argument of samft.train ...]

Starts samft.train on every visible GPU (one process without a GPU). The first start makes a virtual
environment in .venv and installs samft there. Without arguments: writes a small demo dataset to
runs/demo-data and tunes vit_tiny on it.

    bash launch.sh
    bash launch.sh --data_root DATASET --model_type vit_b --checkpoint_path auto --output_dir RUN
    srun --nodes=2 --ntasks-per-node=1 bash launch.sh --config FILE.yaml

Environment:
    CUDA_VISIBLE_DEVICES    which GPUs
    NPROC_PER_NODE          number of processes on this machine, instead of one for each GPU
    NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT
                            several machines: start this on each; SLURM's variables are read if unset
    MAX_RESTARTS            how often to restart a failed run from its last checkpoint (3)
    SAMFT_VENV              the virtual environment, instead of .venv
    SAMFT_PYTHON            a Python that has samft installed; then nothing is installed
    LAUNCH_DRY_RUN=1        prints the command and stops
An active virtual or conda environment is used if samft is installed in it, and never changed.

Exit code: 0 done, 1 failed, 2 wrong usage, configuration, data or checkpoint, 75 stopped by a signal
with everything saved (run it again to resume), 130 interrupted.
USAGE
}

say() { echo "launch.sh: $*" >&2; }

die() {
    say "$*"
    exit 2
}

# Whether a Python has torch installed, and samft from this folder and no other copy of it.
has_samft() {
    (cd / && "$1" -c 'if True:
        import importlib.metadata, os, sys, samft
        importlib.metadata.version("torch")
        sys.exit(not os.path.samefile(os.path.dirname(samft.__file__), sys.argv[1]))
        ' "$REPO/samft") 2>/dev/null
}

base_python() {
    local name
    for name in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.10 python; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    die "no Python 3.10 or newer found. Install one, or name it: PYTHON=/path/to/python3 bash launch.sh"
}

# Prints the Python to use. It may not exist yet: install_once makes it.
choose_python() {
    local active
    if [[ -n ${SAMFT_PYTHON:-} ]]; then
        echo "$SAMFT_PYTHON"
        return
    fi
    for active in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
        if [[ -n $active ]] && has_samft "$active/bin/python"; then
            echo "$active/bin/python"
            return
        fi
    done
    echo "$VENV/bin/python"
}

# Changes with what an installation depends on.
current_stamp() {
    (cd "$REPO" && echo "$REPO" | cat - setup.cfg pyproject.toml constraints.txt | cksum)
}

is_installed() {
    [[ -f $VENV/.samft-installed && $(<"$VENV/.samft-installed") == "$(current_stamp)" ]]
}

# Installs samft into $VENV unless that is up to date. Nodes and processes that share a disk wait for
# the first one, if the flock command exists.
install_once() {
    is_installed && return
    local base quiet=-qq
    if [[ -t 2 ]]; then
        quiet= # at a terminal, pip shows how its downloads go
    fi
    mkdir -p "$VENV"
    exec 9>"$VENV/.samft-lock"
    if command -v flock >/dev/null; then
        flock 9
    fi
    if ! is_installed; then
        say "installing samft into $VENV (once; a minute or more)"
        if ! "$VENV/bin/python" -c '' 2>/dev/null; then
            base=$(base_python)
            "$base" -m venv "$VENV" || die "cannot make a virtual environment with $base (see above)"
        fi
        "$VENV/bin/python" -m pip install ${quiet:+"$quiet"} --disable-pip-version-check \
            -c "$REPO/constraints.txt" -e "$REPO" >&2 || die "the installation failed (see above)"
        current_stamp >"$VENV/.samft-installed.$$"
        mv "$VENV/.samft-installed.$$" "$VENV/.samft-installed"
    fi
    exec 9>&-
}

count_gpus() {
    local present=0 id
    if command -v nvidia-smi >/dev/null; then
        present=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || true
    fi
    if ((present > 0)) && [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        present=0
        for id in ${CUDA_VISIBLE_DEVICES//,/ }; do
            # As in CUDA: devices after an invalid id are hidden, and an empty list hides all. Of
            # several slices of GPUs (MIG) a process sees the first alone.
            [[ $id == -1 || $id == NoDevFiles ]] && break
            present=$((present + 1))
            [[ $id == MIG-* ]] && break
        done
    fi
    echo "$present"
}

count_cores() {
    nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1
}

# Whether a Python, which may not exist yet, reads "device: cpu" from these arguments.
trains_on_cpu() {
    local python=$1
    shift
    case " $* " in *" --device cpu "* | *" --device=cpu "*) return ;; esac
    case " $* " in *" --config"*) ;; *) return 1 ;; esac
    "$python" -c 'if True:
        import sys
        from samft.config import parse_config
        sys.exit(parse_config(sys.argv[1:]).device != "cpu")
        ' "$@" 2>/dev/null
}

# Prints the number of processes to start on this node, given the Python and the arguments of
# samft.train.
count_processes() {
    local gpus
    if [[ -n ${NPROC_PER_NODE:-} ]]; then
        echo "$NPROC_PER_NODE"
        return
    fi
    if trains_on_cpu "$@"; then
        echo 1
        return
    fi
    gpus=$(count_gpus)
    echo $((gpus > 0 ? gpus : 1))
}

first_slurm_host() {
    local list=${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST:-${SLURM_NODELIST:-}}}
    if command -v scontrol >/dev/null; then
        scontrol show hostnames "$list" | sed -n 1p
    elif [[ $list =~ ^([^][,]+)(\[([0-9]+))? ]]; then # node[03-07,12],other -> node03
        echo "${BASH_REMATCH[1]}${BASH_REMATCH[3]:-}"
    fi
}

# Sets RENDEZVOUS: torchrun's arguments for the number of nodes and how they connect.
choose_rendezvous() {
    local nodes rank address port job=${SLURM_JOB_ID:-0}
    nodes=${NNODES:-${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:-1}}}
    [[ $nodes =~ ^[1-9][0-9]*$ ]] || die "NNODES is '$nodes', but must be a number of at least 1"
    if ((nodes == 1)); then
        RENDEZVOUS=(--standalone --nnodes 1)
        return
    fi
    if [[ -z ${NNODES:-} && ${SLURM_LOCALID:-0} != 0 ]]; then
        die "SLURM started this more than once on a node. Start it with srun --ntasks-per-node=1"
    fi
    rank=${NODE_RANK:-${SLURM_NODEID:-}}
    if ! [[ $rank =~ ^[0-9]+$ ]] || ((rank >= nodes)); then
        die "with NNODES=$nodes, NODE_RANK must be 0 to $((nodes - 1)), different on each node;" \
            "it is '$rank'"
    fi
    address=${MASTER_ADDR:-$(first_slurm_host)}
    [[ -n $address ]] ||
        die "with NNODES=$nodes, MASTER_ADDR must be the address of the node with NODE_RANK 0"
    # Different jobs on one node need different ports.
    port=${MASTER_PORT:-$((job ? 10000 + job % 50000 : 29500))}
    RENDEZVOUS=(--nnodes "$nodes" --node_rank "$rank"
        --master_addr "$address" --master_port "$port")
}

# Sets defaults for the run; variables that are set already are kept. $1: processes on this node.
set_environment() {
    local threads=$(($(count_cores) / $1))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
    # What a process wrote last is to be read, however it ended.
    export PYTHONUNBUFFERED=${PYTHONUNBUFFERED:-1}
    # The number of masks changes from step to step, which fragments GPU memory otherwise. PyTorch
    # prefers this name to the older ones, and would overlook what those were set to.
    if [[ -z ${PYTORCH_CUDA_ALLOC_CONF:-}${PYTORCH_HIP_ALLOC_CONF:-} ]]; then
        export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
    fi
    # Seconds that torchrun waits between a signal and SIGKILL: enough to save the largest model.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
}

# Ends this script with 75 at a signal before the run begins, also within a command of `prepare`.
stop_early() {
    say "stopped by SIG$1 before the run began: there is nothing to save"
    [[ -z ${PREPARING:-} ]] || kill -TERM -- "-$PREPARING" 2>/dev/null || true
    exit 75
}

# Runs a command of the preparation so that a signal is heard at once: a script would wait for the
# end of a command in the foreground first.
prepare() {
    local code=0
    set -m # a process group of its own, which can be ended as a whole
    "$@" </dev/null &
    PREPARING=$!
    set +m
    wait "$PREPARING" || code=$?
    PREPARING=''
    return "$code"
}

# Forwards a signal to CHILD, or stores it until CHILD has started. With the first signal, remembers
# the status file as it was before. A Ctrl-C goes to the processes of torchrun instead, which save and
# end: torchrun itself would print warnings and a traceback around the one sentence that counts.
forward_signal() {
    local ranks
    $STOPPED || STATUS_BEFORE=$(cat "$SAMFT_STATUS_FILE" || true)
    STOPPED=true
    if [[ -z $CHILD ]]; then
        PENDING=$1
    elif [[ $1 != INT ]]; then
        kill -"$1" "$CHILD" 2>/dev/null || true
    elif ranks=$(cat /proc/"$CHILD"/task/*/children 2>/dev/null) && [[ -n ${ranks// /} ]]; then
        # shellcheck disable=SC2086  # a number for each process
        kill -INT $ranks 2>/dev/null || true
    else
        kill -TERM "$CHILD" 2>/dev/null || true # quietly, also while torchrun is imported
    fi
}

# Runs a command, forwards signals to it, waits for its end, and sets CODE to its exit code and
# STOPPED to whether there was a signal. Job control (set -m) puts it into its own process group, so
# that a Ctrl-C reaches it once, forwarded from here, and is not ignored as by a background process.
run_and_wait() {
    local signal
    STOPPED=false STATUS_BEFORE='' CHILD='' PENDING=''
    # Before the command starts: a signal in between would end this script but not the command.
    for signal in TERM INT USR1 USR2; do
        # shellcheck disable=SC2064  # $signal is to be expanded now
        trap "forward_signal $signal" "$signal"
    done
    # When the terminal is closed, stop in good order too.
    trap "forward_signal TERM" HUP QUIT
    set -m
    "$@" &
    CHILD=$!
    [[ -z $PENDING ]] || forward_signal "$PENDING"
    # A signal makes `wait` return while the command is still running.
    while :; do
        CODE=0
        wait "$CHILD" || CODE=$?
        kill -0 "$CHILD" 2>/dev/null || break
    done
    trap - TERM INT USR1 USR2 HUP QUIT
    set +m
}

# Reports a wrong flag or YAML key once and at once, instead of in every process of torchrun.
check_arguments() {
    local python=$1
    shift
    "$python" -c 'if True:
        import sys
        from samft.config import parse_config
        from samft.cli import run_command
        sys.exit(run_command(parse_config))
        ' "$@"
}

# Prints the exit code of the run. torchrun exits with 1 whatever the exit codes of its workers are,
# so rank 0 writes its own to the status file.
exit_code() {
    local python=$1 status_file=$2 code=$3
    [[ -s $status_file ]] || {
        # There is no status yet. If stopped this early, there is nothing to save.
        if $STOPPED; then echo 75; else echo "$code"; fi
        return
    }
    "$python" - "$status_file" "$code" "$STATUS_BEFORE" <<'PYTHON'
import json, sys
text, torchrun_code, status_before = open(sys.argv[1]).read(), int(sys.argv[2]), sys.argv[3]
status = json.loads(text)
code = status.get("exit_code")
if code == 1 and text.strip() == status_before.strip():
    # The run failed before the signal, and torchrun would have restarted it: that is a stop, too.
    code = 75
    print("launch.sh: stopped after a failure, before the run was started again", file=sys.stderr)
if code is None or status.get("state") == "running":  # killed
    code = torchrun_code or 1
elif torchrun_code and status.get("reason"):  # repeated, as torchrun's own output hides it
    print(f"launch.sh: {status['reason']}", file=sys.stderr)
print(code or torchrun_code)
PYTHON
}

# The second part of the demo: the same objects from one click, by the weights before and after.
compare_clicks() {
    local python=$1 runs=$2 best
    best=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["best_checkpoint"])' \
        "$runs/demo/summary.json") || return
    say "the same objects from one click, two and three, before and after: $runs/demo-clicks/scores.html"
    run_and_wait "$python" -m samft.evaluate --checkpoint "$REPO/samft/pretrained/vit_tiny.pth" \
        "$best" --data_root "$runs/demo-data" --clicks 3 --output "$runs/demo-clicks/scores.json" \
        >/dev/null # the page has the table, too
}

# Says how the shell gets the samft that ran, if it has another or none.
name_environment() {
    local bin activate
    bin=$(dirname "$1")
    activate=$bin/activate
    [[ ! $(command -v samft) -ef $bin/samft && -f $activate ]] || return 0
    [[ $activate != "$PWD"/* ]] || activate=${activate#"$PWD"/}
    say "samft is installed in $(dirname "$bin"). To have it in this shell:"
    printf '  source %q\n' "$activate" >&2
}

# Sets COMMAND: what starts the processes of this node, given the Python and the arguments of
# samft.train.
set_command() {
    local processes
    processes=$(count_processes "$@")
    set_environment "$processes"
    COMMAND=("$1" -m torch.distributed.run "${RENDEZVOUS[@]}" --nproc_per_node "$processes"
        --max-restarts "${MAX_RESTARTS:-3}"
        --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2" -m samft.train
        "${@:2}")
}

main() {
    local python demo=false home='' signal
    for signal in TERM INT HUP QUIT USR1 USR2; do
        # shellcheck disable=SC2064  # $signal is to be expanded now
        trap "stop_early $signal" "$signal"
    done
    python=$(choose_python)
    case " $* " in *" --help "* | *" -h "*)
        usage
        if has_samft "$python"; then
            printf '\nArguments of samft.train:\n\n'
            exec "$python" -m samft.train --help
        fi
        printf '\nThe arguments of samft.train are in docs/configuration.md, and here once samft is installed.\n'
        return
        ;;
    esac
    if (($# == 0)); then
        demo=true
        [[ $PWD -ef $REPO ]] || home=$REPO/ # paths are printed, and must hold where the person is
        set -- --config "${home}configs/demo.yaml" --data_root "${home}runs/demo-data" \
            --output_dir "${home}runs/demo"
        # One process, so that the demo gives the same result on every machine.
        NPROC_PER_NODE=${NPROC_PER_NODE:-1}
    fi

    [[ ${NPROC_PER_NODE:-1} =~ ^[1-9][0-9]*$ ]] ||
        die "NPROC_PER_NODE is '$NPROC_PER_NODE', but must be a number of at least 1"
    choose_rendezvous
    if [[ ${LAUNCH_DRY_RUN:-0} == 1 ]]; then
        set_command "$python" "$@"
        printf '%q ' "${COMMAND[@]}" | sed 's/ $//'
        echo
        return
    fi

    if [[ $python == "$VENV/bin/python" && -z ${SAMFT_PYTHON:-} ]]; then
        prepare install_once
    fi
    if $demo; then
        say "writing a small demo dataset to ${home}runs/demo-data"
        prepare "$python" -m samft.demo --output_dir "${home}runs/demo-data" >/dev/null
    fi
    prepare check_arguments "$python" "$@"
    set_command "$python" "$@"
    SAMFT_STATUS_FILE=$(mktemp "${TMPDIR:-/tmp}/samft-status.XXXXXX")
    export SAMFT_STATUS_FILE
    trap 'rm -f "$SAMFT_STATUS_FILE"' EXIT
    run_and_wait "${COMMAND[@]}"
    CODE=$(exit_code "$python" "$SAMFT_STATUS_FILE" "$CODE")
    if $demo && ((CODE == 0)); then compare_clicks "$python" "${home}runs"; fi
    ((CODE != 0)) || name_environment "$python"
    exit "$CODE"
}

main "$@"
