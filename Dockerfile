# CPU and GPU alike: the CUDA libraries come with torch. Build: docker build -t wrinklefree .
# Run: docker run --rm -v "$PWD/outputs:/app/outputs" wrinklefree [--gpus all ... ] scripts/train.py
FROM python:3.11-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends git g++ \
    && rm -rf /var/lib/apt/lists/* \
    && pip install --no-cache-dir uv

WORKDIR /app
COPY pyproject.toml uv.lock hatch_build.py README.md LICENSE ./
COPY extern/cheapertraining extern/cheapertraining
COPY src src
COPY configs configs
COPY benchmark benchmark
COPY scripts scripts
RUN uv sync --locked --no-dev

ENTRYPOINT ["uv", "run", "--no-sync", "--no-dev", "python"]
CMD ["scripts/train.py"]
