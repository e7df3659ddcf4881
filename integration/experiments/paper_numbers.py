"""Measured numbers of HydraServe's paper, read from its artifact (figures 7, 9 and 11)."""

from __future__ import annotations

RATES = (0.6, 0.7, 0.8)
CVS = (2, 4, 8)

#: Figure 9: parts of 100 that met the TTFT objective; by system and CV, in the order of RATES.
ATTAINMENT: dict[str, dict[int, tuple[float, float, float]]] = {
    "serverless-vllm": {2: (46.7, 45.7, 43.9), 4: (49.9, 48.6, 44.7), 8: (53.5, 53.3, 48.5)},
    "serverlessllm": {2: (57.5, 49.8, 45.3), 4: (61.5, 57.7, 47.7), 8: (60.3, 57.7, 54.0)},
    "hydraserve": {2: (81.1, 77.2, 73.8), 4: (84.2, 78.2, 71.8), 8: (82.5, 76.3, 75.2)},
    "hydraserve-cache": {2: (83.7, 79.1, 78.3), 4: (88.2, 83.8, 79.3), 8: (88.2, 85.0, 78.5)},
}

#: Figure 11: the same by application, CV 8, 0.6 requests a second.
BY_APPLICATION: dict[str, dict[str, float]] = {
    "serverless-vllm": {"chat": 51.8, "code": 45.0, "summarization": 91.5},
    "serverlessllm": {"chat": 60.6, "code": 48.1, "summarization": 99.6},
    "hydraserve": {"chat": 83.5, "code": 76.6, "summarization": 97.3},
    "hydraserve-cache": {"chat": 89.5, "code": 83.0, "summarization": 99.1},
}

#: Checkpoints of figure 7: GB in 16 bits, layers, GB of the embedding and of the head.
CHECKPOINTS: dict[str, tuple[float, int, float]] = {
    "opt-2.7b": (5.30, 32, 0.26),
    "opt-6.7b": (13.32, 32, 0.41),
    "opt-13b": (25.70, 40, 0.52),
    "llama2-7b": (13.48, 32, 0.26),
    "llama2-13b": (26.03, 40, 0.33),
    "llama3-8b": (16.06, 32, 1.05),
    "falcon-7b": (14.43, 32, 0.59),
}

#: Figure 7: cold TTFT in seconds, by GPU, system and checkpoint.
COLD_TTFT_S: dict[str, dict[str, dict[str, float]]] = {
    "v100": {
        "serverless-vllm": {
            "opt-2.7b": 16.78,
            "opt-6.7b": 23.63,
            "opt-13b": 40.26,
            "llama2-7b": 23.16,
            "llama2-13b": 38.58,
            "llama3-8b": 29.21,
            "falcon-7b": 25.43,
        },
        "serverlessllm": {
            "opt-2.7b": 13.10,
            "opt-6.7b": 17.11,
            "opt-13b": 26.15,
            "llama2-7b": 19.09,
            "llama2-13b": 26.19,
            "llama3-8b": 21.16,
            "falcon-7b": 19.09,
        },
        "serverlessllm, cached": {
            "opt-2.7b": 11.09,
            "opt-6.7b": 11.75,
            "opt-13b": 14.77,
            "llama2-7b": 12.11,
            "llama2-13b": 15.14,
            "llama3-8b": 13.15,
            "falcon-7b": 12.10,
        },
        "hydraserve, 1 worker": {
            "opt-2.7b": 7.92,
            "opt-6.7b": 9.74,
            "opt-13b": 17.03,
            "llama2-7b": 9.91,
            "llama2-13b": 17.39,
            "llama3-8b": 11.70,
            "falcon-7b": 10.23,
        },
        "hydraserve": {
            "opt-2.7b": 7.93,
            "opt-6.7b": 8.18,
            "opt-13b": 8.52,
            "llama2-7b": 7.66,
            "llama2-13b": 8.71,
            "llama3-8b": 8.57,
            "falcon-7b": 8.30,
        },
    },
    "a10": {
        "serverless-vllm": {
            "opt-2.7b": 10.14,
            "opt-6.7b": 17.02,
            "llama2-7b": 16.57,
            "llama3-8b": 19.33,
            "falcon-7b": 16.21,
        },
        "serverlessllm": {
            "opt-2.7b": 10.05,
            "opt-6.7b": 14.10,
            "llama2-7b": 14.08,
            "llama3-8b": 17.07,
            "falcon-7b": 14.10,
        },
        "serverlessllm, cached": {
            "opt-2.7b": 7.06,
            "opt-6.7b": 7.74,
            "llama2-7b": 8.08,
            "llama3-8b": 9.09,
            "falcon-7b": 8.08,
        },
        "hydraserve, 1 worker": {
            "opt-2.7b": 4.68,
            "opt-6.7b": 8.33,
            "llama2-7b": 8.36,
            "llama3-8b": 10.25,
            "falcon-7b": 8.98,
        },
        "hydraserve": {
            "opt-2.7b": 4.75,
            "opt-6.7b": 5.86,
            "llama2-7b": 5.59,
            "llama3-8b": 6.31,
            "falcon-7b": 6.17,
        },
    },
}
