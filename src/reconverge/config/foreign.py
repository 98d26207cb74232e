"""What other frameworks call a setting, and what is said here to whoever types it."""

# Words -> what to do instead; {value} is what was typed behind the word. A word that is a setting of the
# script at hand is never looked up.
WORDS = {
    # training
    "learning_rate base_lr": "optim.lr={value}",
    "wd": "optim.weight_decay={value}",
    "epoch num_epochs n_epochs nepochs max_epochs num_train_epochs": "epochs={value}",
    "max_steps num_steps n_steps iterations iters max_iters": (
        "steps={value}, or schedule_steps={value} for the length of the schedule"
    ),
    "batch_size bs batchsize train_batch_size per_device_train_batch_size": (
        "batch={value}, the images of one step over all ranks"
    ),
    "eval_batch_size val_batch_size test_batch_size": "evaluate.batch={value}",
    "grad_accum accum_steps grad_accum_steps accumulation_steps gradient_accumulation accumulate_grad_batches"
    " gradient_accumulation_steps": (
        "batch= and microbatch=: a step accumulates batch / microbatch gradients on one rank"
    ),
    "optimizer opt optimiser optim.name optim.type": (
        "nothing: AdamW is the only optimizer; its settings are optim.lr=, optim.weight_decay=, optim.betas="
    ),
    "momentum nesterov": "optim.betas=[0.9,0.999]: AdamW is the only optimizer",
    "sched scheduler lr_scheduler lr_schedule": (
        "optim.warmup_epochs=, optim.min_lr= or epochs=: the schedule is a linear warm-up and a cosine decay"
        " (with optim.schedule=poly a linear one)"
    ),
    "warmup warmup_steps warmup_epoch": "optim.warmup_epochs=, in whole epochs",
    "clip_grad grad_clip max_norm max_grad_norm clip_grad_norm gradient_clip_val": "optim.clip={value}",
    "ema_decay model_ema model_ema_decay": "ema.decay=0.9999; ema.decay=null turns EMA off",
    "loss criterion loss_fn": (
        "nothing: the loss is cross-entropy; mix.smoothing=, mix.mixup=, mix.cutmix= change its targets"
    ),
    "label_smoothing": "mix.smoothing={value}",
    "mixup_alpha": "mix.mixup={value}",
    "cutmix_alpha": "mix.cutmix={value}",
    "class_weights class_weight": "nothing: every image has the same weight",
    "patience early_stopping": "nothing: the schedule is trained to its end, and the best checkpoint is kept",
    # model and weights
    "arch architecture backbone net network model_name": "model={value}, or model=timm model.timm={value}",
    "freeze frozen freeze_backbone linear_probe trainable": (
        "optim.layer_decay=0.5, say: no layer can be frozen, but the first ones then learn far more slowly"
    ),
    "pretrained finetune weights load_from initial_checkpoint": (
        "init=timm:NAME, init=runs/NAME or init=FILE: it starts from these weights"
    ),
    "resume resume_from checkpoint checkpoint_path ckpt ckpt_path load": (
        "the same command again, which resumes its run; init=runs/NAME starts a new run from its weights"
    ),
    "num_classes n_classes nb_classes classes": "leave it out: the number of classes comes from the data",
    "dropout drop drop_rate": "model.drop_path={value}, which is stochastic depth; there is no dropout",
    # images
    "size img_size image_size input_size imgsz im_size resolution crop_size": (
        "augment.size={value} evaluate.size={value}"
    ),
    "no_aug aug aa auto_augment autoaugment augmentation augmentations randaugment transform transforms": (
        "augment.auto=none augment.erase=0 augment.flip=0 augment.scale=[1,1] mix.mixup=0 mix.cutmix=0, of"
        " which each turns one augmentation off"
    ),
    "data_dir data_path dataset dataset_path imagenet_path path train_dir train_data": (
        "data=folder data.root=/path"
    ),
    "j num_workers n_workers": "workers={value}",
    # machine
    "gpu gpus n_gpus ngpus num_gpus devices world_size nproc_per_node ranks nodes num_nodes": (
        "launch/local.sh --ranks N key=value ... for N GPUs of this machine; launch/slurm.sbatch for several"
    ),
    "amp use_amp fp16 bf16 half mixed_precision amp_dtype dtype": "precision=bf16 or precision=fp16",
    # folders and reports
    "name run_name exp_name experiment output out output_dir out_dir save_dir work_dir log_dir logdir": (
        "run=NAME: everything is then in runs/NAME/"
    ),
    "logger wandb log_wandb use_wandb tensorboard": "tracker=wandb or tracker=tensorboard",
    "test test_only eval eval_only validate suite images": (
        "python eval.py checkpoint=runs/NAME: train.py evaluates the validation images by itself"
    ),
}

# The same for eval.py.
EVAL_WORDS = {
    "model init weights pretrained run resume ckpt ckpt_path checkpoint_path load load_from": (
        "checkpoint=runs/NAME, or checkpoint=timm:NAME"
    ),
    "batch_size bs batchsize eval_batch_size": "batch={value}",
    "img_size image_size input_size imgsz resolution crop_size": "size={value}",
    "image img input file files folder path": "images={value}",
    "root data_dir data_path dataset imagenet_path": "data=folder data.root=/path",
    "j num_workers n_workers": "workers={value}",
    "amp use_amp fp16 bf16 half mixed_precision dtype": "precision=bf16 or precision=fp16",
}

# The same for values: a setting and what others write there -> what to do.
VALUES = {
    ("optim.schedule", "cosine"): (
        "leave it out: each of them is a linear warm-up and a cosine decay, as the named code computes it"
    ),
    ("device", "gpu"): "device=cuda",
    ("device", "mps"): "device=cpu: Apple's GPU is not supported",
    ("precision", "16"): "precision=fp16 or precision=bf16",
    ("precision", "32"): "precision=fp32",
    ("precision", "amp"): "precision=fp16 or precision=bf16",
    ("precision", "half"): "precision=fp16",
    ("precision", "float16"): "precision=fp16",
    ("precision", "bfloat16"): "precision=bf16",
    ("precision", "float32"): "precision=fp32",
}


def advice(key: str, value: str, evaluating: bool = False) -> str | None:
    """What to do instead of key=value, where `key`, or its last or first part, is such a word.

    `evaluating`: in eval.py.
    """
    said = {
        word: text for words, text in (EVAL_WORDS if evaluating else WORDS).items() for word in words.split()
    }
    key = key.lower().replace("-", "_")
    for word in (key, key.rpartition(".")[2], key.partition(".")[0]):
        if word in said:
            return said[word].format(value=value or "...")
    return None
