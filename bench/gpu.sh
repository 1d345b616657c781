#!/usr/bin/env bash
# Everything that wants a GPU, in slices of at most so many seconds:
#
#     bench/gpu.sh OUT [SECONDS]        600, if not said; the same command again goes on with the step that comes next
#
# Needs this checkout and a python3 (or PYTHON=…) with torch and triton, and what the trainer needs besides (numpy,
# safetensors, sentencepiece, tiktoken, nvidia-ml-py, pytest): nothing is installed, and the network is not used.
# Others (transformers, Liger, flash-attn, compute-sanitizer) are measured, or used, where they are there.
#
# OUT gets four files, all that a later slice needs, on another machine too: steps.jsonl (what was done, which it leaves
# out), results.jsonl (what was measured, a row each), log.txt (what was said) and summary.md. A step that the end of a
# slice cuts off is made anew in the next; if a whole slice is too short for it, it is given up. Exit code 0: all steps
# are done; 1: so are they, and some failed; 75: there is more to do.
#
#     DEVICE=cpu bench/gpu.sh OUT       the rehearsal: the same steps on a CPU, on small shapes
#     ONLY='kernels|step' bench/gpu.sh OUT      steps whose names match
set -u
usage() { echo "usage: bench/gpu.sh OUT [SECONDS]" >&2; exit 2; }
[ $# -ge 1 ] && [ $# -le 2 ] || usage
case ${2:-600} in *[!0-9]* | "") usage ;; esac
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
slice=${2:-600} device=${DEVICE:-cuda} only=${ONLY:-.} python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
ln -s "$root" "$work/tritium" # the checkout is the package
export PYTHONPATH="$work${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
cache=${TMPDIR:-/tmp}/tritium-gpu-$(id -u) # what is compiled: a slice on the same machine finds it
export TRITON_CACHE_DIR="$cache/triton" TORCHINDUCTOR_CACHE_DIR="$cache/inductor" PYTHONPYCACHEPREFIX="$cache/pycache"
cd "$root" || exit 2
touch "$out/steps.jsonl" "$out/results.jsonl"
[ "$device" = cuda ] || export CUDA_VISIBLE_DEVICES=
if [ "$device" = cuda ] && ! "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
    echo "bench/gpu.sh: $python's torch sees no GPU (DEVICE=cpu rehearses without one)" >&2
    exit 2
fi

# The steps' machinery ------------------------------------------------------------------------------------------------

SECONDS=0 # bash counts on from here
fresh=yes # nothing was begun in this slice
beside=() # the steps that run now

record() { # NAME STATUS SECONDS
    printf '{"step": "%s", "status": "%s", "seconds": %d}\n' "$1" "$2" "$3" >>"$out/steps.jsonl"
    printf '%-40s %-10s %5d s\n' "$1" "$2" "$3"
}

pause() {
    summarise
    echo "to be continued: run it again ($1 is next)"
    exit 75
}

done_before() { grep -qF "\"step\": \"$1\"" "$out/steps.jsonl"; }

begin() { # NAME COMMAND…: beside others; what it says, its rows, its exit code and its seconds go to files of that name
    local name=$1 left=$((slice - SECONDS))
    shift
    [[ $name =~ $only ]] || return 0
    ! done_before "$name" || return 0
    if [ -z "$(command -v "$1")" ]; then record "$name" absent 0 && return 0; fi
    if [ $fresh = no ] && [ $left -lt $((slice / 10)) ]; then finish && pause "$name"; fi
    beside+=("$name")
    local whole=$fresh # it has the whole slice
    [ $left -ge $((slice * 9 / 10)) ] || whole=no
    {
        local begun=$SECONDS
        printf '\n===== %s: %s\n' "$name" "$*"
        timeout --kill-after=10 "$((left > 0 ? left : 1))" "$@" 2>&1
        echo "$? $((SECONDS - begun)) $whole" >"$work/$name.code"
    } >"$work/$name.log" &
}

finish() { # what was begun: wait for all of it, and record it
    local name code seconds whole cut=
    wait
    for name in "${beside[@]}"; do
        read -r code seconds whole <"$work/$name.code"
        cat "$work/$name.log" >>"$out/log.txt"
        if [ "$code" = 124 ] || [ "$code" = 137 ]; then
            if [ "$whole" = yes ]; then record "$name" "too long" "$seconds"; else cut=${cut:-$name}; fi
            continue
        fi
        [ ! -f "$work/$name.rows" ] || cat "$work/$name.rows" >>"$out/results.jsonl"
        case $code in
            0) record "$name" ok "$seconds" ;;
            5) record "$name" "no tests" "$seconds" ;; # pytest's word for it
            *) record "$name" "failed ($code)" "$seconds" ;;
        esac
    done
    [ ${#beside[@]} = 0 ] || fresh=no
    beside=()
    [ -z "$cut" ] || pause "$cut"
}

step() { # NAME COMMAND…: alone
    begin "$@"
    finish
}

summarise() { "$python" -m tritium.bench summary --folder="$out" >"$out/summary.md"; }

bench() { # STEP NAME OPTIONS…: python -m tritium.bench NAME
    local name=$1
    shift
    step "$name" "$python" -m tritium.bench "$@" --out="$work/out" --jsonl="$work/$name.rows"
}

has() { "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }

# The steps -----------------------------------------------------------------------------------------------------------
# What proves most comes first. Tests run beside one another, so that the CPUs compile at once; each in a process of its
# own, which the others survive. What is timed runs alone.

llama() { # LAYERS HIDDEN INNER HEADS VOCABULARY: a decoder's shape
    shape=(--model.layers=$1 --model.hidden_size=$2 --model.intermediate_size=$3 --model.heads=$4 --model.kv_heads=$4
        --vocab_size=$5)
}

ops="adamw_ attention cross_entropy decode_attention dequantize_nf4 gae geglu global_norm linear_cross_entropy
linear_kl linear_logprob lora_linear rms_norm rope segment_sum swiglu"
if [ "$device" = cuda ]; then
    backend=cuda marks="gpu and not long" jobs=$(nproc)
    model=(--preset=1b --context=4096 --bin_tokens=16384) large=(--preset=8b --context=2048 --bin_tokens=8192)
    llama 12 768 2048 12 49152
    small=("${shape[@]}" --context=1024 --bin_tokens=16384) curve=(--rounds=5 --steps=40) turns=(--rounds=3 --steps=5)
    decoder=(--preset=1b --batches=1,8,32,256 --prompts=256 --rounds=2)
else
    backend=torch marks="not long and not gpu" jobs=2
    llama 2 64 128 2 256
    small=("${shape[@]}" --context=64 --bin_tokens=128) curve=(--rounds=2 --steps=4) turns=(--rounds=1 --steps=1)
    model=("${small[@]}" --steps=2) large=("${small[@]}" --steps=2)
    decoder=(--vocab_size=256 --batches=1,2 --steps=2 --rounds=1 --prompts=2)
fi

step machine "$python" -c "
import json, sys
from tritium.bench.kernels import run_facts
from tritium.kernels.doctor import machine
facts = {'op': 'machine', **run_facts('$device'), 'doctor': machine()}
print(json.dumps(facts, indent=1)); print(json.dumps(facts), file=open(sys.argv[1], 'w'))" "$work/machine.rows"
step nvidia-smi nvidia-smi

# Correct: each op's suite, and all that waits for a GPU elsewhere.
tests=tests/kernels/test_all_ops.py
pytest() { # NAME MARKS ARGUMENTS…: beside as many others as there are CPUs
    [ "$(jobs -rp | wc -l)" -lt $jobs ] || wait -n
    begin "$1" "$python" -m pytest -p no:cacheprovider -m "$2" "${@:3}"
}
of_op() { # the tests of an op, and not of those whose names end as its does
    local others=
    case $1 in attention) others="and not decode_attention" ;; cross_entropy) others="and not linear_cross" ;; esac
    echo "($1-$backend or $backend-$1) $others"
}
for file in $(grep -rl --include='test_*.py' mark.gpu tests | grep -v $tests); do
    pytest "${file//\//-}" gpu "$file"
done
for op in $ops; do pytest "test-$op" "$marks" $tests -k "$(of_op "$op")"; done
finish

# Fast: the shapes for which there are bars, then the usual ones of all ops.
quick=(kernels --device="$device" --dtypes=bfloat16 --quick)
if [ "$device" = cuda ]; then
    each=(kernels --seconds=1)
    bench kernels-attention-16k "${quick[@]}" --ops=attention --shape=T=16384,N=16384
    bench kernels-heads-152k "${quick[@]}" --ops=linear_cross_entropy,linear_logprob --shape=V=151936
    bench kernels-large "${quick[@]}" --ops=rms_norm,rope --shape=T=32768
    bench kernels "${quick[@]}"
else
    each=("${quick[@]}")
fi

# A model trains and generates.
bench step-full step --device="$device" "${model[@]}" --recompute=none,selective,full
if has transformers; then others=(--against=hf_autocast,hf); else others=(); fi
bench train-text train "${small[@]}" --text --lr=3e-4 "${curve[@]}" "${others[@]}"
bench generate generate --device="$device" "${decoder[@]}"
bench train-stages train "${small[@]}" --stages=pretrain,sft,dpo,ppo,grpo "${turns[@]}"
bench step-adapters step --device="$device" "${large[@]}" --finetune=lora,qlora
bench train-compiled train "${small[@]}" --against=nanogpt,hf_compiled "${turns[@]}"
step ladder-smoke "$python" -m tritium.stages run --recipe=smoke --out="$work/smoke"

# One shape of each kernel under the sanitizer.
for op in $ops; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 begin "sanitizer-$op" compute-sanitizer --error-exitcode=9 "$python" -m pytest \
        -p no:cacheprovider -m "$marks" $tests -k "(cuda-$op) and same_bits"
done
finish

# Launches: what else there is, and how far the heuristics are from it.
if [ "$device" = cuda ]; then
    bench tune-attention tune --ops=attention --shape=T=16384,N=16384
    bench tune-heads tune --ops=linear_logprob --shape=V=151936
    bench tune-others tune --ops=lora_linear,swiglu,cross_entropy
else
    export TRITON_INTERPRET=1 TRITIUM_BACKEND=triton
    bench tune tune --device=cpu --ops=attention,swiglu --most=2 --shape=T=40,N=40,H=2,G=1,D=16,F=64
    unset TRITON_INTERPRET TRITIUM_BACKEND
fi

# What takes long, and tells least: fp32, torch.compile, and every shape × dtype × layout of each op.
for op in $ops; do bench "kernels-$op" "${each[@]}" --ops="$op"; done
if [ "$device" = cuda ]; then
    for op in $ops; do pytest "test-all-$op" "gpu and long" $tests -k "$(of_op "$op")"; done
    finish
fi

summarise
failed=$?
cat "$out/summary.md"
exit $failed
