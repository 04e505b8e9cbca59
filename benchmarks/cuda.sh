#!/bin/bash
# All that needs a CUDA card, in one call: the checks, then the figures, as JSON beside this file. From the project's root.
set -e -o pipefail
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python -m pytest -q tests/test_devices.py tests/test_compiled_decode.py tests/test_activations.py tests/test_optimizer.py tests/test_adapters.py

measure() { python scripts/benchmark_training.py --device cuda --rounds 2 --steps 5 "$@" > /dev/null; }

# Speed at the shape of Llama-3-8B, random weights: against the card's own matrix rate, transformers + PEFT, and QLoRA
measure --model llama-3-8b --batch_size 1 --sequence_length 4096 --out benchmarks/training_cuda_8b_4096.json \
  --contestants '["lit-llama, compile", "lit-llama", "lit-llama, checkpoint 1", "lit-llama, nf4-dq", "transformers + peft", "transformers + peft, checkpointing"]'
# Memory of QLoRA at 2,048 tokens
measure --model llama-3-8b --batch_size 1 --sequence_length 2048 --out benchmarks/training_cuda_8b_2048.json \
  --contestants '["lit-llama, nf4-dq, checkpoint 1", "lit-llama, least memory", "lit-llama, nf4-dq"]'
# Packed short documents
measure --model llama-3-8b --batch_size 1 --sequence_length 4096 --document_length 400 --contestants peers \
  --out benchmarks/training_cuda_8b_documents.json
# The longest window under the memory of consumer cards
python scripts/benchmark_training.py --device cuda --model llama-3.1-8b --caps_gb '[8, 12, 16, 24]' --out benchmarks/longest_cuda_8b.json
# Switching adapters, and a batch in which each row has another
python scripts/benchmark_adapters.py --device cuda --model llama-3-8b --out benchmarks/adapters_cuda_8b.json

# Generation: one prompt against the card's copy bandwidth, then many at a time
generate() { python scripts/benchmark_generation.py --device cuda --rounds 2 --model llama-3-8b --overwrite true "$@" > /dev/null; }
generate --out benchmarks/generation_cuda_8b.json --contestants '["lit-llama", "lit-llama compile", "lit-llama int8 compile",
  "lit-llama int4 compile", "lit-llama nf4", "lit-llama nf4 compile", "transformers"]'
for rows in 8 32 128; do
  generate --batch_size "$rows" --prefill_tokens 128 --out "benchmarks/generation_cuda_8b_$rows.json" \
    --contestants '["lit-llama", "lit-llama compile", "lit-llama int8 compile", "lit-llama int4 compile", "transformers"]'
done
