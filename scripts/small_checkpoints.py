"""Write small random checkpoints of SD3, Flux, PixArt and DiT, whole pipelines with text encoders, to try commands on.

    python scripts/small_checkpoints.py /tmp/small
    shiva-search optimize --model /tmp/small/sd3 --text-tokens 8 --mean-keep 60% --out reports/small-sd3
    shiva-search generate reports/small-sd3 --count 2 --steps 4

In: nothing, and no network. Out: folders in diffusers format of a few hundred kilobytes each, the same every time.
Their images are noise; what is shown is that every command takes such a folder. In a call of your own PixArt's
pipeline needs `use_resolution_binning=False`: its bins begin at larger images.
"""

from __future__ import annotations

import argparse
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

#: Pixels a side that the transformers are made for: 64 image tokens.
RESOLUTION = 128
_LATENT = RESOLUTION // 8
_HEADS, _HEAD = 2, 16
_CLIP, _T5 = 16, 32  # widths of the text encoders; SD3 puts both CLIPs side by side into the width of T5
_LETTERS = string.ascii_lowercase + string.digits


def vae(channels: int) -> Any:
    """Eight times smaller latents, as the real ones."""
    return diffusers.AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(2,) * 4,
        norm_num_groups=1,
        sample_size=RESOLUTION,
        shift_factor=0.0,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


def clip(kind: type[Any]) -> tuple[Any, Any]:
    """A tokenizer that knows letters, and its text encoder."""
    pieces = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=_CLIP,
        intermediate_size=2 * _CLIP,
        projection_dim=_CLIP,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=vocab["<|endoftext|>"],
    )
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=config.max_position_embeddings)
    return tokenizer, kind(config)


def t5() -> tuple[Any, Any]:
    """A tokenizer that knows letters, and its encoder."""
    pieces = ["<pad>", "</s>", "<unk>", "\N{LOWER ONE EIGHTH BLOCK}", *_LETTERS]
    vocab = [(piece, -float(index)) for index, piece in enumerate(pieces)]
    tokenizer = transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=_T5, d_kv=8, d_ff=2 * _T5, num_layers=2, num_heads=2
    )
    return tokenizer, transformers.T5EncoderModel(config)


def sd3() -> Any:
    """SD3.5 Medium in small: joint blocks, dual attention in the first ones."""
    (tokenizer, encoder), (tokenizer_2, encoder_2) = (clip(transformers.CLIPTextModelWithProjection) for _ in range(2))
    tokenizer_3, encoder_3 = t5()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=_LATENT,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=_HEAD,
        num_attention_heads=_HEADS,
        joint_attention_dim=_T5,
        caption_projection_dim=_HEADS * _HEAD,
        pooled_projection_dim=2 * _CLIP,
        pos_embed_max_size=2 * _LATENT,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=encoder_3,
        tokenizer_3=tokenizer_3,
    )


def flux() -> Any:
    """Flux.1 dev in small: two double and two single blocks, guidance as an input."""
    (tokenizer, encoder), (tokenizer_2, encoder_2) = clip(transformers.CLIPTextModel), t5()
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=_HEAD,
        num_attention_heads=_HEADS,
        joint_attention_dim=_T5,
        pooled_projection_dim=_CLIP,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )
    return diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(4),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
    )


def pixart() -> Any:
    """PixArt-Sigma in small."""
    tokenizer, encoder = t5()
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=_LATENT,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        attention_head_dim=_HEAD,
        num_attention_heads=_HEADS,
        cross_attention_dim=_HEADS * _HEAD,
        caption_channels=_T5,
        use_additional_conditions=False,
    )
    return diffusers.PixArtSigmaPipeline(
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        vae=vae(4),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )


def dit() -> Any:
    """DiT in small, with all of ImageNet's class numbers, as its pipeline asks for."""
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=_LATENT,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        attention_head_dim=_HEAD,
        num_attention_heads=_HEADS,
        num_embeds_ada_norm=1000,
        norm_num_groups=2,
    )
    return diffusers.DiTPipeline(transformer=transformer, scheduler=diffusers.DDIMScheduler(), vae=vae(4))


PIPELINES: Mapping[str, Callable[[], Any]] = {"sd3": sd3, "flux": flux, "pixart": pixart, "dit": dit}


def write(folder: Path, name: str, seed: int = 0) -> Path:
    """Write one of PIPELINES into a folder of its name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = PIPELINES[name]()
    pipeline.save_pretrained(folder / name)
    return folder / name


def main() -> None:
    """Read the command line, write all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in PIPELINES:
        print(write(args.folder, name, args.seed))


if __name__ == "__main__":
    main()
