// _C: introspection for Python. No torch header but DLPack's, so that it depends on no torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "../introspect.h"
#include "freshness.h"

namespace py = pybind11;

namespace {

mnv2::DType dtype_from(const std::string& name) {
  if (name == "float32") return mnv2::DType::kFloat32;
  if (name == "bfloat16") return mnv2::DType::kBFloat16;
  if (name == "float16") return mnv2::DType::kFloat16;
  throw std::invalid_argument("plan: dtype must be float32, bfloat16 or float16, got " + name);
}

py::dict cpu_plan(int64_t n, int64_t h, int64_t w, int64_t c_in, int64_t c_hidden, int64_t c_out, int64_t kernel,
                  int64_t stride, int64_t dilation, std::array<int64_t, 4> padding, bool has_expand, bool residual,
                  int64_t threads, const std::string& dtype, int64_t l1, int64_t l2) {
  const mnv2::BlockShape shape{n,          h,          w,        c_in,       c_hidden,   c_out,
                               kernel,     stride,     dilation, padding[0], padding[1], padding[2],
                               padding[3], has_expand, residual, 0.f,        6.f};
  mnv2::Machine machine = mnv2::cpu_machine(threads);
  if (l1 > 0) machine.l1 = l1;
  if (l2 > 0) machine.l2 = l2;
  const mnv2::BlockPlan plan = mnv2::cpu_plan(shape, dtype_from(dtype), machine);
  py::dict d;
  d["isa"] = mnv2::cpu_isa();
  d["l1"] = machine.l1;
  d["l2"] = machine.l2;
  d["h_out"] = mnv2::h_out(shape);
  d["w_out"] = mnv2::w_out(shape);
  d["chunk"] = mnv2::kChunk;
  d["rows"] = plan.rows;
  d["ring_rows"] = plan.ring_rows;
  d["strips"] = plan.strips;
  d["groups"] = plan.groups;
  d["group_sets"] = plan.group_sets;
  d["tasks"] = n * plan.strips * plan.group_sets;
  d["scratch_bytes"] = 4 * plan.scratch;
  d["shared_bytes"] = 4 * plan.shared;
  d["macs"] = mnv2::macs(shape);
  return d;
}

py::dict cpu_network_plan(int64_t n, int64_t h, int64_t w, int64_t c, const std::vector<int64_t>& stem,
                          const std::vector<int64_t>& blocks, const std::vector<int64_t>& head,
                          const std::vector<double>& bounds, int64_t threads, const std::string& dtype) {
  const mnv2::NetworkFacts facts =
      mnv2::cpu_network_plan(n, h, w, c, {stem, blocks, head, bounds}, dtype_from(dtype), mnv2::cpu_machine(threads));
  py::dict d;
  d["fused_stem"] = facts.fused_stem;
  d["steps"] = facts.steps;
  d["images_at_a_time"] = facts.slice;
  d["steps_for_a_few_images"] = facts.large;
  d["arena_bytes"] = facts.arena_bytes;
  return d;
}

py::dict cuda_launch(const mnv2::CudaLaunch& launch) {
  const mnv2::cuda::BlockPlan& plan = launch.plan;
  const mnv2::cuda::Grid& grid = launch.grid;
  py::dict d;
  d["name"] = launch.name;
  d["grid"] = std::array<int64_t, 3>{grid.x, grid.y, grid.z};
  d["threads"] = grid.threads;
  d["shared_bytes"] = grid.shared;
  d["cycles"] = launch.load.cycles;
  d["shared_cycles"] = launch.load.shared;
  d["tensor_cycles"] = launch.load.tensor;
  d["issue_cycles"] = launch.load.issue;
  d["memory_bytes"] = launch.load.bytes;
  if (launch.shape.kernel == 0) return d;
  const mnv2::BlockShape& s = launch.shape;
  d["input"] = std::array<int64_t, 3>{s.h, s.w, s.c_in};
  d["hidden"] = s.c_hidden;
  d["output"] = std::array<int64_t, 3>{mnv2::h_out(s), mnv2::w_out(s), s.c_out};
  d["residual"] = s.residual;
  d["fits"] = plan.fits;
  d["tile_h"] = plan.tile_h;
  d["tile_w"] = plan.tile_w;
  d["images"] = plan.images;
  d["splits"] = plan.splits;
  d["buffers"] = plan.buffers;
  d["column_parts"] = plan.columns.parts;
  d["column_tiles"] = plan.columns.tiles;
  d["blocks"] = plan.blocks;
  d["blocks_at_once"] = plan.at_once;
  d["partial_bytes"] = 4 * plan.partial;
  d["tickets"] = plan.tickets;
  return d;
}

py::dict cuda_plan(int64_t n, int64_t h, int64_t w, int64_t c_in, int64_t c_hidden, int64_t c_out, int64_t kernel,
                   int64_t stride, int64_t dilation, std::array<int64_t, 4> padding, bool has_expand, bool residual,
                   const std::string& dtype, const std::string& device, bool exact) {
  const mnv2::BlockShape shape{n,          h,          w,        c_in,       c_hidden,   c_out,
                               kernel,     stride,     dilation, padding[0], padding[1], padding[2],
                               padding[3], has_expand, residual, 0.f,        6.f};
  return cuda_launch(mnv2::cuda_plan(shape, dtype_from(dtype), exact, device));
}

py::dict cuda_network_plan(int64_t n, int64_t h, int64_t w, int64_t c, const std::vector<int64_t>& stem,
                           const std::vector<int64_t>& blocks, const std::vector<int64_t>& head,
                           const std::vector<double>& bounds, const std::string& dtype, const std::string& device,
                           bool exact) {
  const mnv2::CudaNetworkFacts facts =
      mnv2::cuda_network_plan(n, h, w, c, {stem, blocks, head, bounds}, dtype_from(dtype), exact, device);
  py::dict d;
  d["fits"] = facts.fits;
  d["joined"] = facts.joined;
  d["memory_bytes"] = facts.memory_bytes;
  d["packed_bytes"] = facts.packed_bytes;
  py::list launches;
  for (const mnv2::CudaLaunch& launch : facts.launches) launches.append(cuda_launch(launch));
  d["launches"] = launches;
  return d;
}

// None where nothing keeps it from fitting.
std::optional<std::string> reason(const std::string& why) {
  return why.empty() ? std::nullopt : std::optional<std::string>(why);
}

std::optional<std::string> cuda_block_unfit(int64_t n, int64_t h, int64_t w, int64_t c_in, int64_t c_hidden,
                                            int64_t c_out, int64_t kernel, int64_t stride, int64_t dilation,
                                            std::array<int64_t, 4> padding, bool has_expand, const std::string& dtype,
                                            int64_t shared_block_bytes) {
  const mnv2::BlockShape shape{n,          h,          w,        c_in,       c_hidden,   c_out,
                               kernel,     stride,     dilation, padding[0], padding[1], padding[2],
                               padding[3], has_expand, false,    0.f,        6.f};
  return reason(mnv2::cuda_unfit(shape, dtype_from(dtype), shared_block_bytes));
}

std::optional<std::string> cuda_stem_unfit(int64_t n, int64_t h, int64_t w, int64_t c_in, int64_t c_out, int64_t kernel,
                                           int64_t stride, std::array<int64_t, 4> padding, const std::string& dtype) {
  const mnv2::StemShape shape{n,          h,          w,          c_in,       c_out, kernel, stride,
                              padding[0], padding[1], padding[2], padding[3], 0.f,   6.f};
  return reason(mnv2::cuda_unfit(shape, dtype_from(dtype)));
}

std::optional<std::string> cuda_head_unfit(int64_t n, int64_t h, int64_t w, int64_t c_in, int64_t c_last,
                                           int64_t classes) {
  return reason(mnv2::cuda_unfit(mnv2::HeadShape{n, h, w, c_in, c_last, classes, 0.f, 6.f}));
}

std::optional<std::string> cuda_network_unfit(int64_t n, int64_t h, int64_t w, int64_t c,
                                              const std::vector<int64_t>& stem, const std::vector<int64_t>& blocks,
                                              const std::vector<int64_t>& head, const std::vector<double>& bounds,
                                              const std::string& dtype, int64_t shared_block_bytes) {
  return reason(mnv2::cuda_unfit(n, h, w, c, {stem, blocks, head, bounds}, dtype_from(dtype), shared_block_bytes));
}

py::dict cuda_device(const std::string& name) {
  const mnv2::cuda::Device device = mnv2::cuda_device(name);
  py::dict d;
  d["multiprocessors"] = device.multiprocessors;
  d["shared_block_bytes"] = device.shared_block;
  d["shared_bytes"] = device.shared_all;
  return d;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Introspection of mnv2_fused: build, ISA, tile plans, scratch memory, changes of weights.";
  m.def(
      "build_info",
      [] {
        py::dict d;
        for (const auto& [name, value] : mnv2::build_info()) d[py::str(name)] = value;
        return d;
      },
      "Facts about the build, by name.");
  m.def("cpu_isa", &mnv2::cpu_isa, "Name of the instruction set whose kernels are in use.");
  m.def("cpu_supported_isas", &mnv2::cpu_supported_isas, "Names that MNV2_FUSED_CPU_ISA may have here, least first.");
  m.def("cpu_plan", &cpu_plan, py::arg("n"), py::arg("h"), py::arg("w"), py::arg("c_in"), py::arg("c_hidden"),
        py::arg("c_out"), py::arg("kernel"), py::arg("stride"), py::arg("dilation"), py::arg("padding"),
        py::arg("has_expand"), py::arg("residual"), py::arg("threads"), py::arg("dtype") = "float32", py::arg("l1") = 0,
        py::arg("l2") = 0,
        "The tile plan of a block on this machine; l1 and l2 (bytes) replace the machine's caches where positive.");
  m.def("cpu_network_plan", &cpu_network_plan, py::arg("n"), py::arg("h"), py::arg("w"), py::arg("c"), py::arg("stem"),
        py::arg("blocks"), py::arg("head"), py::arg("bounds"), py::arg("threads"), py::arg("dtype") = "float32",
        "The plan of the operator `network`; lists as it takes them.");
  m.def("cuda_plan", &cuda_plan, py::arg("n"), py::arg("h"), py::arg("w"), py::arg("c_in"), py::arg("c_hidden"),
        py::arg("c_out"), py::arg("kernel"), py::arg("stride"), py::arg("dilation"), py::arg("padding"),
        py::arg("has_expand"), py::arg("residual"), py::arg("dtype") = "float16", py::arg("device") = "sm_90",
        py::arg("exact") = false,
        "The plan of a block on a GPU, which need not be there; device: sm_80 (A100), sm_86 (A10) or sm_90 (H200); "
        "exact: float32 without tf32. Cycles are those of one multiprocessor: of the launch, and the least that each "
        "of its parts would need; memory_bytes what the GPU's memory has to carry.");
  m.def(
      "cuda_network_plan", &cuda_network_plan, py::arg("n"), py::arg("h"), py::arg("w"), py::arg("c"), py::arg("stem"),
      py::arg("blocks"), py::arg("head"), py::arg("bounds"), py::arg("dtype") = "float16", py::arg("device") = "sm_90",
      py::arg("exact") = false,
      "The plan of the operator `network` on a GPU, launch by launch as cuda_plan; lists as the operator takes them.");
  m.def("cuda_device", &cuda_device, py::arg("name"), "What these plans depend on.");
  m.def("cuda_block_unfit", &cuda_block_unfit, py::arg("n"), py::arg("h"), py::arg("w"), py::arg("c_in"),
        py::arg("c_hidden"), py::arg("c_out"), py::arg("kernel"), py::arg("stride"), py::arg("dilation"),
        py::arg("padding"), py::arg("has_expand"), py::arg("dtype"), py::arg("shared_block_bytes"),
        "Why a block cannot run on a GPU whose thread blocks can have so much shared memory; None where it can.");
  m.def("cuda_stem_unfit", &cuda_stem_unfit, py::arg("n"), py::arg("h"), py::arg("w"), py::arg("c_in"),
        py::arg("c_out"), py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("dtype"),
        "The same of a stem, on any GPU.");
  m.def("cuda_head_unfit", &cuda_head_unfit, py::arg("n"), py::arg("h"), py::arg("w"), py::arg("c_in"),
        py::arg("c_last"), py::arg("classes"), "The same of a head, on any GPU.");
  m.def("cuda_network_unfit", &cuda_network_unfit, py::arg("n"), py::arg("h"), py::arg("w"), py::arg("c"),
        py::arg("stem"), py::arg("blocks"), py::arg("head"), py::arg("bounds"), py::arg("dtype"),
        py::arg("shared_block_bytes"), "The same of what the operator `network` runs; lists as it takes them.");
  m.attr("CHUNK") = mnv2::kChunk;
  m.def("cpu_fma_peak", &mnv2::cpu_fma_peak,
        "Multiply-adds a second of one core on registers alone, in the instruction set in use (takes about 20 ms).");
  m.def("scratch_high_water", &mnv2::cpu_scratch_high_water,
        "Bytes of the largest scratch requests since the last reset, summed over threads.");
  m.def("reset_scratch_high_water", &mnv2::cpu_reset_scratch_high_water);
  py::class_<mnv2::SameObjects>(m, "SameObjects",
                                "Whether objects still have the types, and dicts the entries, that they had.")
      .def(py::init<const py::list&, const py::list&>(), py::arg("objects"), py::arg("dicts"))
      .def("holds", &mnv2::SameObjects::holds);
  py::enum_<mnv2::Watch>(m, "Watch", "What of a tensor is watched. Each member watches all that the one before does.")
      .value("PLACE", mnv2::Watch::kPlace, "Type, address, dtype, shape, strides, size of the storage.")
      .value("VERSION", mnv2::Watch::kVersion, "The version counter.")
      .value("CONTENTS", mnv2::Watch::kContents,
             "A fingerprint of a dense tensor on the CPU. Its version counts if the fingerprint is partial, unless it "
             "is an inference tensor.");
  py::class_<mnv2::SameTensors>(m, "SameTensors", "Whether tensors are what they were.")
      .def(py::init<const std::vector<std::pair<py::object, mnv2::Watch>>&>(), py::arg("tensors"),
           "`tensors`: each with its Watch. Raises RuntimeError if a storage holds fewer bytes than its tensor needs.")
      .def("holds", &mnv2::SameTensors::holds, "Reads no memory that a storage has given back.");
  m.def("check_alongside", &mnv2::check_alongside, py::arg("objects"), py::arg("tensors"),
        "Asks a SameObjects and a SameTensors whether they hold, in this thread's next CPU operator, while the other "
        "threads begin to compute.");
  m.def("check_held", &mnv2::check_held, "Whether both held; to be called after that operator.");
}
