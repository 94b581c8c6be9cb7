#!/bin/bash
# Stage 1 of LLaVA-1.5 (scripts/v1_5/pretrain.sh) with the fuser: MLP and fuser are trained, 8 GPUs, global batch 256.
# Run it from a LLaVA checkout. Every variable can be set in the environment: SIZE=13b bash pretrain.sh
set -euo pipefail

SIZE=${SIZE:-7b}
MODEL=${MODEL:-lmsys/vicuna-$SIZE-v1.5}
VISION_TOWER=${VISION_TOWER:-openai/clip-vit-large-patch14-336}
DATA=${DATA:-./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}
IMAGES=${IMAGES:-./playground/data/LLaVA-Pretrain/images}
OUTPUT=${OUTPUT:-./checkpoints/llava-v1.5-$SIZE-mmfuser-pretrain}
RATES="--learning_rate 1e-3"
if [ "$SIZE" = 13b ]; then RATES="$RATES --mm_fuser_lr 1e-4"; fi # the paper's rate of the fuser

deepspeed llava/train/train_mem.py \
    $RATES \
    --deepspeed ./scripts/zero2.json \
    --model_name_or_path "$MODEL" \
    --version plain \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --vision_tower "$VISION_TOWER" \
    --mm_projector_type mmfuser \
    --tune_mm_mlp_adapter True \
    --mm_vision_select_layer -2 \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --bf16 True \
    --output_dir "$OUTPUT" \
    --num_train_epochs 1 \
    --per_device_train_batch_size 32 \
    --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps 1 \
    --evaluation_strategy no \
    --save_strategy steps \
    --save_steps 24000 \
    --save_total_limit 1 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type cosine \
    --logging_steps 1 \
    --tf32 True \
    --model_max_length 2048 \
    --gradient_checkpointing True \
    --dataloader_num_workers 4 \
    --lazy_preprocess True \
    --report_to wandb \
    "$@"
