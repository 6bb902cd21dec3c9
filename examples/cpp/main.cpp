// Runs a packaged model without Python, on an image whose pixels rise from -1 to 1. Prints its three likeliest classes.
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <limits>

int main(int argc, char** argv) try {
  if (argc != 2) return std::fprintf(stderr, "usage: run MODEL.pt2\n"), 2;
  const c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  const at::Tensor x = at::arange(3 * 224 * 224).div(3 * 112 * 224).sub(1).view({1, 3, 224, 224});
  const at::Tensor image = x.contiguous(at::MemoryFormat::ChannelsLast);

  at::Tensor y;
  double fastest = std::numeric_limits<double>::infinity();
  for (int i = 0; i < 30; ++i) {
    const auto start = std::chrono::steady_clock::now();
    y = model.run({image})[0];
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
    fastest = std::min(fastest, took.count());
  }
  const auto [values, classes] = y[0].topk(3);
  for (int i = 0; i < 3; ++i) {
    std::printf("class %ld: %.9g\n", static_cast<long>(classes[i].item<int64_t>()), values[i].item<float>());
  }
  std::printf("%.2f ms\n", fastest);
} catch (const std::exception& error) {
  return std::fprintf(stderr, "%s\n", error.what()), 1;
}
