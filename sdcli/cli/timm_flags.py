"""Options of other trainers, timm's train.py and validate.py first, and what `sdcli` has in their place.

VALUE in an answer stands for the value that was typed. An answer that does not begin with an option is the rest of a
sentence about `sdcli`.
"""

from __future__ import annotations

_SPLITS = "finds the splits by their names: train, validation, test"
_LAUNCHER = "leaves processes to a launcher: torchrun --nproc-per-node N -m sdcli train MODEL"
_MEASURED = "measures it on the training images, or takes it from the pretrained weights"
_LOADING = "decides it by itself"
_RGB = "reads images as RGB"
_STUDENT = "--set networks.student.model_args."

TIMM = {
    # Data
    "--data-dir": "--dataset VALUE",
    "--dataset-download": "downloads data sets of the Hugging Face hub by itself: --dataset OWNER/NAME",
    "--dataset-trust-remote-code": "never runs code of a data set",
    "--train-split": _SPLITS,
    "--val-split": _SPLITS,
    "--split-name": _SPLITS,
    "--train-num-samples": "--limit-train VALUE",
    "--val-num-samples": "--limit-val VALUE",
    "--num-samples": "--limit VALUE",
    "--class-map": "numbers the classes in the order of the training split's folder names",
    "--input-key": "--image-key VALUE",
    "--target-key": "--label-key VALUE",
    "--input-img-mode": _RGB,
    # Model
    "--model": "takes the model as an argument: sdcli train VALUE",
    "--model-kwargs": f"{_STUDENT}VALUE",
    "--pretrained-path": "--weights VALUE",
    "--initial-checkpoint": "--weights VALUE",
    "--checkpoint": "--weights VALUE",
    "--num-classes": "counts the classes of the data set",
    "--gp": f"{_STUDENT}global_pool=VALUE",
    "--drop": f"{_STUDENT}drop_rate=VALUE",
    "--drop-path": f"{_STUDENT}drop_path_rate=VALUE",
    "--drop-connect": f"{_STUDENT}drop_path_rate=VALUE",
    "--drop-block": f"{_STUDENT}drop_block_rate=VALUE",
    "--img-size": "--image-size VALUE",
    "--input-size": "--image-size PIXELS",
    "--in-chans": _RGB,
    "--mean": _MEASURED,
    "--std": _MEASURED,
    "--crop-pct": "scores whole images, or crops as the pretrained weights do",
    # Batches and devices
    "--validation-batch-size": "scores with --batch-size too",
    "--amp": "--precision bf16",
    "--amp-dtype": "--precision bf16, or --precision fp16",
    "--amp-impl": "--precision bf16, or --precision fp16",
    "--model-dtype": "--precision bf16, or --precision fp16",
    "--channels-last": "--memory-format channels-last",
    "--torchcompile": "--compile",
    "--torchcompile-mode": "--compile",
    "--torchscript": "--compile",
    "--world-size": _LAUNCHER,
    "--local-rank": _LAUNCHER,
    "--sync-bn": "has no synchronised batch norm: each process normalises its own images",
    "--dist-bn": "scores and saves the batch-norm statistics of the first process",
    "--pin-mem": _LOADING,
    "--no-prefetcher": _LOADING,
    "--use-multi-epochs-loader": _LOADING,
    "--worker-seeding": "varies an image by seed, epoch and index alone, with any number of --workers",
    # Optimizer and schedule
    "--opt": "--set optimizer.opt=VALUE",
    "--momentum": "--set optimizer.momentum=VALUE",
    "--weight-decay": "--set optimizer.weight_decay=VALUE",
    "--clip-grad": "--set optimizer.clip_grad=VALUE",
    "--clip-mode": "clips the norm of the gradient: --set optimizer.clip_grad=1.0",
    "--lr-base": "has --lr, which does not grow with the batch",
    "--sched": "--set schedule.sched=VALUE",
    "--warmup-epochs": "--set schedule.warmup_epochs=VALUE",
    "--warmup-lr": "--set schedule.warmup_lr=VALUE",
    "--min-lr": "--set schedule.min_lr=VALUE",
    "--decay-epochs": "--set schedule.decay_epochs=VALUE",
    "--decay-milestones": "--set 'schedule.decay_milestones=[75, 130]'",
    "--decay-rate": "--set schedule.decay_rate=VALUE",
    "--start-epoch": "resumes where a run stopped: sdcli train --resume RUN",
    # Augmentation and losses
    "--no-aug": "--set batch.augment.crop=none --set batch.augment.hflip=0",
    "--train-crop-mode": "--set batch.augment.crop=resized",
    "--hflip": "--set batch.augment.hflip=VALUE",
    "--vflip": "has no vertical flip",
    "--color-jitter": "--set batch.augment.aa=POLICY (sdcli recipes policies)",
    "--aa": "--set batch.augment.aa=VALUE",
    "--reprob": "--set batch.augment.reprob=VALUE",
    "--mixup": "--set batch.mixup=VALUE",
    "--cutmix": "--set batch.cutmix=VALUE",
    "--mixup-prob": "--set batch.mixup_prob=VALUE",
    "--mixup-switch-prob": "gives mixup and cutmix half of the images each where a recipe has both",
    "--smoothing": "--set losses.task.smoothing=VALUE",
    "--model-ema": "--set ema.decay=0.9998",
    "--model-ema-decay": "--set ema.decay=VALUE",
    "--model-ema-warmup": "--set ema.warmup=true",
    # The run
    "--log-interval": "shows progress several times a second, and logs every epoch to log.jsonl",
    "--recovery-interval": "--save-every VALUE",
    "--checkpoint-hist": "keeps two checkpoints, best.safetensors and last.safetensors",
    "--experiment": "--output VALUE",
    "--log-wandb": "--track wandb",
    "--results-file": "has --json, which prints to stdout: --json > FILE",
    "--use-ema": "scores the average of the weights where the recipe has [ema]",
}

OTHERS = {
    # Ultralytics
    "--data": "--dataset VALUE",
    "--imgsz": "--image-size VALUE",
    "--batch": "--batch-size VALUE",
    "--lr0": "--lr VALUE",
    "--project": "--output FOLDER",
    "--name": "--output FOLDER",
    "--optimizer": "--set optimizer.opt=VALUE",
    # Common names
    "--bs": "--batch-size VALUE",
    "--learning-rate": "--lr VALUE",
    "--wd": "--set optimizer.weight_decay=VALUE",
    "--max-epochs": "--epochs VALUE",
    "--num-epochs": "--epochs VALUE",
    "--num-workers": "--workers VALUE",
    "--output-dir": "--output VALUE",
    "--save-dir": "--output VALUE",
    "--out": "--output VALUE",
    "--config": "--recipe VALUE",
    "--cfg": "--recipe VALUE",
    "--gpu": "--device cuda:VALUE",
    "--gpus": "--device cuda",
    "--fp16": "--precision fp16",
    "--bf16": "--precision bf16",
    "--wandb": "--track wandb",
    "--tensorboard": "--track tensorboard",
}

_ITS_CHECKPOINT = "takes the checkpoint as an argument: sdcli eval VALUE"
_FROM_CHECKPOINT = "reads it from the checkpoint"

ELSEWHERE = {
    "eval": {
        "--checkpoint": _ITS_CHECKPOINT,
        "--weights": _ITS_CHECKPOINT,
        "--pretrained": _FROM_CHECKPOINT,
        "--model": _FROM_CHECKPOINT,
        "--img-size": _FROM_CHECKPOINT,
        "--imgsz": _FROM_CHECKPOINT,
        "--input-size": _FROM_CHECKPOINT,
        "--num-classes": _FROM_CHECKPOINT,
        "--val-split": "--split VALUE",
        "--split-name": "--split VALUE",
        "--val-num-samples": "--limit VALUE",
    },
    "tune": {"--resume": "continues a search with the command that started it", "--n-trials": "--budget VALUE"},
    "inspect": {"--model": "takes the model as an argument: sdcli inspect VALUE"},
}
"""Answers that differ in a command other than `train`."""
