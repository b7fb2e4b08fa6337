"""What `autoround.py` runs in AutoRound's own interpreter."""

import sys

from auto_round import AutoRound, AutoScheme

OPTIONS = "NVFP4,MXFP8,BF16"
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def main() -> None:
    model, text, out, bits, samples, length, iterations, device = sys.argv[1:]
    scheme = AutoScheme(avg_bits=float(bits), options=OPTIONS, shared_layers=JOINED)
    AutoRound(
        model,
        scheme=scheme,
        dataset=text,
        nsamples=int(samples),
        seqlen=int(length),
        iters=int(iterations),
        device_map=device,
    ).quantize_and_save(out, format="llm_compressor")


if __name__ == "__main__":
    main()
