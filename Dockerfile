# The page and the APIs of `birefnet serve`, by the steps of the README: install the extra `serve`, run the command.
#
#   docker build -t birefnet .                                      # PyPI's PyTorch: CUDA, and CPUs as well
#   docker build -t birefnet --build-arg TORCH_INDEX=URL .          # another build of PyTorch, such as the small one
#                                                                   # for CPUs; pytorch.org names the address
#   docker build -t birefnet --build-arg VARIANTS=general,portrait .    # with these weights in the image
#
#   docker run --rm -p 127.0.0.1:7860:7860 birefnet
#   docker run --rm -p 7860:7860 --gpus all -v $PWD/keys.txt:/keys.txt:ro birefnet --api-key-file /keys.txt
#   docker run --rm -p 127.0.0.1:7860:7860 -v huggingface:/home/birefnet/.cache/huggingface birefnet \
#       --variant general        # weights from the Hub, kept in a volume
FROM python:3.11-slim

ARG TORCH_INDEX=""
ARG VARIANTS=""

RUN useradd --create-home --uid 1000 birefnet
WORKDIR /app
COPY . .
# timm needs torchvision, which must be built for the same torch.
RUN if [ -n "$TORCH_INDEX" ]; then \
        pip install --no-cache-dir --index-url "$TORCH_INDEX" $(grep -E '^torch(vision)?==' constraints.txt); \
    fi \
    && pip install --no-cache-dir --constraint constraints.txt ".[serve]"

USER birefnet
WORKDIR /home/birefnet
# A volume that is mounted here belongs to the user, and not to root.
RUN mkdir -p .cache/huggingface
RUN if [ -n "$VARIANTS" ]; then \
        python -c "import sys; from birefnet.hub.load import load_variant; [load_variant(v) for v in sys.argv[1].split(',')]" "$VARIANTS"; \
    fi

EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=90s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/health', timeout=4)"]
# The container's own address is not loopback: URLs are not fetched unless --allow-url is given.
ENTRYPOINT ["birefnet", "serve", "--host", "0.0.0.0"]
