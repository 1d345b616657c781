#!/usr/bin/env bash
# Everything that wants a GPU, in slices of at most so many seconds:
#
#     bench/gpu.sh OUT [SECONDS]        600, if not said; the same command again goes on with the step that comes next
#
# Needs this checkout and a python3 (or PYTHON=…) with torch and triton, and what the trainer needs besides (numpy,
# safetensors, sentencepiece, tiktoken, nvidia-ml-py, pytest): nothing is installed, and the network is not used.
# Others (transformers, Liger, flash-attn, compute-sanitizer) are measured, or used, where they are there.
#
# OUT gets four files: steps.jsonl (what was done, which a later slice leaves out), results.jsonl (what was measured, a
# row each), log.txt (what was said) and summary.md. A step that the end of a slice cuts off is made anew in the next;
# if a whole slice is too short for it, it is given up. Exit code 0: all steps are done; 1: so are they, and some failed;
# 75: there is more to do.
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
export PYTHONPATH="$work${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
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

record() { # NAME STATUS SECONDS
    printf '{"step": "%s", "status": "%s", "seconds": %d}\n' "$1" "$2" "$3" >>"$out/steps.jsonl"
    printf '%-40s %-10s %5d s\n' "$1" "$2" "$3"
}

pause() {
    summarise
    echo "to be continued: run it again ($1 is next)"
    exit 75
}

step() { # NAME COMMAND…; of rows that the command writes to $work/rows.jsonl, results.jsonl gets all
    local name=$1 begun=$SECONDS left=$((slice - SECONDS)) code
    shift
    [[ $name =~ $only ]] || return 0
    ! grep -qF "\"step\": \"$name\"" "$out/steps.jsonl" || return 0
    if [ -z "$(command -v "$1")" ]; then record "$name" absent 0 && return 0; fi
    [ $fresh = yes ] || [ $left -ge $((slice / 10)) ] || pause "$name"
    rm -f "$work/rows.jsonl"
    printf '\n===== %s: %s\n' "$name" "$*" >>"$out/log.txt"
    timeout --kill-after=10 "$((left > 0 ? left : 1))" "$@" >>"$out/log.txt" 2>&1
    code=$?
    if [ $code = 124 ] || [ $code = 137 ]; then
        [ $fresh = yes ] || pause "$name"
        record "$name" "too long" $((SECONDS - begun))
        code=0
    fi
    fresh=no
    [ ! -f "$work/rows.jsonl" ] || cat "$work/rows.jsonl" >>"$out/results.jsonl"
    case $code in
        0) grep -qF "\"step\": \"$name\"" "$out/steps.jsonl" || record "$name" ok $((SECONDS - begun)) ;;
        5) record "$name" "no tests" $((SECONDS - begun)) ;; # pytest's word for it
        *) record "$name" "failed ($code)" $((SECONDS - begun)) ;;
    esac
}

summarise() { "$python" -m tritium.bench summary --folder="$out" >"$out/summary.md"; }

bench() { # STEP NAME OPTIONS…: python -m tritium.bench NAME
    local name=$1
    shift
    step "$name" "$python" -m tritium.bench "$@" --out="$work/out" --jsonl="$work/rows.jsonl"
}

has() { "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }

# The steps -----------------------------------------------------------------------------------------------------------

if [ "$device" = cuda ]; then
    backend=cuda marks="gpu and not long"
    sizes=() model=(--preset=1b --context=4096 --bin_tokens=4096) large=(--preset=8b --context=2048 --bin_tokens=2048)
    small=(--model.layers=12 --model.hidden_size=768 --model.intermediate_size=2048 --model.heads=12
        --model.kv_heads=12 --vocab_size=49152 --context=1024 --bin_tokens=16384)
    decoder=(--preset=1b --batches=1,8,32,256) prompts=256
else
    backend=torch marks="not long and not gpu"
    sizes=(--quick)
    small=(--model.layers=2 --model.hidden_size=64 --model.intermediate_size=128 --model.heads=2 --model.kv_heads=1
        --model.head_dim=32 --vocab_size=256 --context=64 --bin_tokens=128 --steps=2)
    model=("${small[@]}") large=("${small[@]}")
    decoder=(--vocab_size=256 --batches=1,2 --steps=2 --rounds=1) prompts=2
fi
ops="adamw_ attention cross_entropy decode_attention dequantize_nf4 gae geglu global_norm linear_cross_entropy
linear_kl linear_logprob lora_linear rms_norm rope segment_sum swiglu"

step machine "$python" -c "
import json, sys
from tritium.bench.kernels import run_facts
from tritium.kernels.doctor import machine
facts = {'op': 'machine', **run_facts('$device'), 'doctor': machine()}
print(json.dumps(facts, indent=1)); print(json.dumps(facts), file=open(sys.argv[1], 'w'))" "$work/rows.jsonl"
step nvidia-smi nvidia-smi

# Correct: each op's suite, then all that waits for a GPU elsewhere, then one shape of each kernel under the sanitizer.
pytest() { step "$1" "$python" -m pytest -p no:cacheprovider -m "$2" "${@:3}"; }
tests=tests/kernels/test_all_ops.py
of_op() { # the tests of an op, and not of those whose names end as its does
    local others=
    case $1 in attention) others="and not decode_attention" ;; cross_entropy) others="and not linear_cross" ;; esac
    echo "($1-$backend or $backend-$1) $others"
}
for op in $ops; do pytest "test-$op" "$marks" $tests -k "$(of_op "$op")"; done
pytest test-others gpu $(grep -rl --include='test_*.py' mark.gpu tests | grep -v $tests)
for op in $ops; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "sanitizer-$op" compute-sanitizer --error-exitcode=9 "$python" -m pytest \
        -p no:cacheprovider -m "$marks" $tests -k "(cuda-$op) and same_bits"
done

# The ladder, from raw text to an aligned model.
step ladder-smoke "$python" -m tritium.stages run --recipe=smoke --out="$work/smoke"

# Fast: each op at its usual shape, and at those for which the bars are written.
for op in $ops; do bench "kernels-$op" kernels --device="$device" --ops="$op" "${sizes[@]}"; done
if [ "$device" = cuda ]; then
    bf16=(--dtypes=bfloat16)
    bench kernels-attention-16k kernels --ops=attention "${bf16[@]}" --shape=T=16384,N=16384
    bench kernels-linear_cross_entropy-152k kernels --ops=linear_cross_entropy "${bf16[@]}" --shape=V=151936
    bench kernels-linear_logprob-152k kernels --ops=linear_logprob "${bf16[@]}" --shape=V=151936
    bench kernels-rms_norm-large kernels --ops=rms_norm "${bf16[@]}" --shape=T=32768
    bench kernels-rope-large kernels --ops=rope "${bf16[@]}" --shape=T=32768
fi

# A model trains and generates.
bench step-full step --device="$device" "${model[@]}" --recompute=none,selective,full
bench step-adapters step --device="$device" "${large[@]}" --finetune=lora,qlora
if has transformers; then bench train-against train --against=hf "${small[@]}"; else bench train-alone train "${small[@]}"; fi
bench generate generate --device="$device" "${decoder[@]}" --prompts=$prompts

# What takes long, and tells least: every shape × dtype × layout of each op.
if [ "$device" = cuda ]; then
    for op in $ops; do pytest "test-all-$op" "gpu and long" $tests -k "$(of_op "$op")"; done
fi

summarise
failed=$?
cat "$out/summary.md"
exit $failed
