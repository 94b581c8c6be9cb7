#!/bin/bash
# Stage 2 of LLaVA-1.5 (scripts/v1_5/finetune.sh) with the fuser: MLP, fuser and LLM are trained, 8 GPUs, global batch 128.
# Run it from a LLaVA checkout. Every variable can be set in the environment: SIZE=13b bash finetune.sh
# LORA=1 trains LoRA on the LLM instead (scripts/v1_5/finetune_lora.sh).
set -euo pipefail

SIZE=${SIZE:-7b}
LORA=${LORA:-0}
MODEL=${MODEL:-lmsys/vicuna-$SIZE-v1.5}
VISION_TOWER=${VISION_TOWER:-openai/clip-vit-large-patch14-336}
ADAPTER=${ADAPTER:-./checkpoints/llava-v1.5-$SIZE-mmfuser-pretrain/mm_projector.bin}
DATA=${DATA:-./playground/data/llava_v1_5_mix665k.json}
IMAGES=${IMAGES:-./playground/data}

if [ "$LORA" = 1 ]; then
    OUTPUT=${OUTPUT:-./checkpoints/llava-v1.5-$SIZE-mmfuser-lora}
    TRAINED="--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 --learning_rate 2e-4"
else
    OUTPUT=${OUTPUT:-./checkpoints/llava-v1.5-$SIZE-mmfuser}
    TRAINED="--learning_rate 2e-5"
fi

deepspeed llava/train/train_mem.py \
    $TRAINED \
    --deepspeed ./scripts/zero3.json \
    --model_name_or_path "$MODEL" \
    --version v1 \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --vision_tower "$VISION_TOWER" \
    --pretrain_mm_mlp_adapter "$ADAPTER" \
    --mm_projector_type mmfuser \
    --mm_vision_select_layer -2 \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --bf16 True \
    --output_dir "$OUTPUT" \
    --num_train_epochs 1 \
    --per_device_train_batch_size 16 \
    --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps 1 \
    --evaluation_strategy no \
    --save_strategy steps \
    --save_steps 50000 \
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
