#!/bin/sh
# `pentad convert` there and back gives the same file; `pentad checkpoint verify` finds a changed byte.
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
fail() {
	echo "FAIL: $*"
	exit 1
}
for model in gpt2 llama mixtral deepseek_v3; do
	golden=$SRCDIR/test/golden/$model
	mkdir "$dir/$model"
	cp "$golden/config.json" "$golden/model.safetensors" "$dir/$model"
	echo '{}' >"$dir/$model/tokenizer.json"
	"$PENTAD" convert "$dir/$model" "$dir/$model-ours" || fail "convert $model"
	"$PENTAD" convert "$dir/$model-ours" "$dir/$model-back" || fail "convert $model back"
	cmp "$golden/model.safetensors" "$dir/$model-back/model.safetensors" || fail "$model differs"
	cmp "$dir/$model/tokenizer.json" "$dir/$model-back/tokenizer.json" || fail "the tokenizer of $model is not there"
	"$PENTAD" config resolve -c "$dir/$model-ours/model.yaml" --set train.train_iters=1 --set run.dir="$dir/run" \
		--set train.micro_batch_size=1 --set train.global_batch_size=1 --set dataset.data_path=none \
		--set optimizer.lr=1e-3 >/dev/null || fail "model.yaml of $model is no configuration"
done
"$PENTAD" convert "$dir/llama" "$dir/gpt2-ours" 2>/dev/null && fail "convert wrote over a folder"
"$PENTAD" checkpoint verify "$dir/llama-ours" || fail "verify of a good checkpoint"
"$PENTAD" checkpoint diff "$dir/llama-ours" "$dir/llama-ours" || fail "diff of a checkpoint and itself"
"$PENTAD" checkpoint diff "$dir/llama-ours" "$dir/gpt2-ours" >/dev/null
[ $? = 1 ] || fail "diff of two models is not 1"
printf 'X' | dd of="$dir/llama-ours/checkpoints/step-00000000/shard-00000.h5" bs=1 seek=70000 conv=notrunc 2>/dev/null
"$PENTAD" checkpoint verify "$dir/llama-ours" 2>"$dir/why"
[ $? = 65 ] || fail "verify of a damaged checkpoint is not 65"
grep -q 'tensor decoder.layers.0.attention' "$dir/why" || fail "verify does not name the tensor: $(cat "$dir/why")"
[ -z "$(find "$dir" -name '*.tmp*')" ] || fail "something temporary is left"
echo ok
