// A second device for torch, "second:0", in the CPU's memory. An operation on it runs as that of the CPU does, and the
// result is on the device. What a GPU refuses, it refuses: operands on two devices and generators of another device.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <mutex>
#include <set>

namespace {

constexpr auto kSecond = c10::DeviceType::PrivateUse1;
const c10::Device kDevice(kSecond, 0);
const c10::Stream kStream(c10::Stream::DEFAULT, kDevice);
std::set<std::string> called;  // every operation that has run here
std::mutex called_mutex;       // a device has a thread of its own for backward passes

// A storage of the device owns one of the CPU, which only operations of the device open.
void release(void* cpu) { delete static_cast<c10::Storage*>(cpu); }
c10::DataPtr held(const c10::Storage& cpu) { return {cpu.mutable_data(), new c10::Storage(cpu), &release, kDevice}; }
c10::Storage opened(const c10::Storage& ours) { return *static_cast<c10::Storage*>(ours.data_ptr().get_context()); }

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    auto* cpu = c10::GetCPUAllocator();
    return held(c10::Storage(c10::Storage::use_byte_size_t{}, n, cpu->allocate(n), cpu, /*resizable=*/true));
  }
  void copy_data(void* to, const void* from, std::size_t n) const override { default_copy_data(to, from, n); }
} allocator;

c10::Storage on_device(const c10::Storage& cpu) {
  return {c10::Storage::use_byte_size_t{}, cpu.nbytes(), held(cpu), &allocator, /*resizable=*/true};
}

at::Tensor with_layout_of(const at::Tensor& other, c10::Storage storage, c10::DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), other.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(other.sizes(), other.strides(), other.storage_offset());
  return made;
}

// The tensors of one operation: those on the device, and for each its twin, a tensor of the CPU on the same memory.
struct Twins {
  std::vector<at::Tensor> ours, twins, others;

  at::Tensor down(const at::Tensor& t) {
    if (!t.defined()) return t;
    if (t.device().type() != kSecond) return others.emplace_back(t);
    for (size_t i = 0; i < ours.size(); i++)
      if (ours[i].is_same(t)) return twins[i];
    ours.push_back(t);
    return twins.emplace_back(with_layout_of(t, opened(t.storage()), c10::DispatchKey::CPU));
  }

  at::Tensor up(const at::Tensor& t) {
    if (!t.defined()) return t;
    for (const auto& other : others)
      if (other.is_same(t)) return t;
    for (size_t i = 0; i < twins.size(); i++)
      if (twins[i].is_same(t)) return ours[i];  // written in place
    for (size_t i = 0; i < twins.size(); i++)
      if (t.storage().is_alias_of(opened(ours[i].storage())))
        return with_layout_of(t, ours[i].storage(), c10::DispatchKey::PrivateUse1);  // a view
    return with_layout_of(t, on_device(t.storage()), c10::DispatchKey::PrivateUse1);
  }

  // What an operation has resized or set in place.
  void settle() {
    for (size_t i = 0; i < ours.size(); i++) {
      auto *mine = ours[i].unsafeGetTensorImpl(), *twin = twins[i].unsafeGetTensorImpl();
      const auto &storage = mine->storage(), &cpu = twin->storage();
      if (!cpu.is_alias_of(opened(storage))) {
        mine->set_storage_keep_dtype(on_device(cpu));
      } else if (storage.nbytes() != cpu.nbytes()) {
        storage.unsafeGetStorageImpl()->set_data_ptr_noswap(held(cpu));
        storage.set_nbytes(cpu.nbytes());
      }
      if (mine->sizes() != twin->sizes() || mine->strides() != twin->strides() ||
          mine->storage_offset() != twin->storage_offset())
        mine->set_sizes_and_strides(twin->sizes(), twin->strides(), twin->storage_offset());
    }
  }
};

void refuse_two_devices(const c10::OperatorHandle& op, const Twins& found) {
  if (found.ours.empty()) return;
  const auto& name = op.schema().name();
  if (name == "aten::copy_" || name == "aten::_copy_from") return;
  // as on CUDA: indices are moved, and a number of the CPU may stand in an operation that goes element by element
  const bool indexes = name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_";
  const bool numbers = op.hasTag(at::Tag::pointwise) || indexes || name.rfind("aten::_foreach", 0) == 0 ||
                       name.rfind("aten::masked_fill", 0) == 0 || name == "aten::fill_";
  for (const auto& other : found.others)
    TORCH_CHECK(
        (indexes && !c10::isFloatingType(other.scalar_type())) || (numbers && other.dim() == 0),
        "Expected all tensors to be on the same device, but found at least two devices, second:0 and ", other.device(),
        "! (when running ", name, ")");
}

void run(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  {
    std::lock_guard<std::mutex> lock(called_mutex);
    called.insert(c10::toString(op.operator_name()));
  }
  Twins found;
  const auto& arguments = op.schema().arguments();
  for (size_t i = stack->size() - arguments.size(); i < stack->size(); i++) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = found.down(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const auto& t : value.toTensorVector()) list.push_back(found.down(t));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& t : value.toOptionalTensorVector())
        list.push_back(t.has_value() ? std::make_optional(found.down(*t)) : std::nullopt);
      value = list;
    } else if (value.isStorage()) {
      if (value.toStorage().device_type() == kSecond) value = opened(value.toStorage());
    } else if (value.isDevice()) {
      value = c10::Device(c10::kCPU);
    } else if (value.isGenerator()) {
      TORCH_CHECK(false, "Expected a 'second' device type for generator but found '", value.toGenerator().device(), "'");
    }
  }
  refuse_two_devices(op, found);
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.callBoxed(stack);
  }
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); i++) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = found.up(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const auto& t : value.toTensorVector()) list.push_back(found.up(t));
      value = list;
    }
  }
  found.settle();
}

using Ints = c10::SymIntArrayRef;

at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, Ints stride,
                       Ints padding, Ints dilation, bool transposed, Ints output_padding, c10::SymInt groups) {
  Twins found;
  std::optional<at::Tensor> b = bias.has_value() ? std::make_optional(found.down(*bias)) : std::nullopt;
  return found.up(at::convolution_symint(found.down(x), found.down(weight), b, stride, padding, dilation, transposed,
                                         output_padding, groups));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& g, const at::Tensor& x, const at::Tensor& weight, Ints stride, Ints padding, Ints dilation,
    bool transposed, Ints output_padding, c10::SymInt groups, std::array<bool, 3> mask) {
  Twins found;
  std::vector<c10::SymInt> bias{weight.sym_size(transposed ? 1 : 0) * (transposed ? groups : c10::SymInt(1))};
  auto [a, b, c] = at::convolution_backward_symint(found.down(g), found.down(x), found.down(weight), Ints(bias), stride,
                                                   padding, dilation, transposed, output_padding, groups, mask);
  return {found.up(a), found.up(b), found.up(c)};
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};

struct Guard final : c10::impl::NoOpDeviceGuardImpl<kSecond> {
  c10::Device getDevice() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Stream getStream(c10::Device) const noexcept override { return kStream; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return kStream; }
  c10::Stream getNewStream(c10::Device, int) const override { return kStream; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
};

const bool registered = [] {
  c10::SetAllocator(kSecond, &allocator);
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return true;
}();

const c10::impl::DeviceGuardImplRegistrar guard(kSecond, new Guard());

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&run>());
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
}

TORCH_LIBRARY(second, m) {
  m.def("called() -> str[]", [] {
    std::lock_guard<std::mutex> lock(called_mutex);
    return std::vector<std::string>(called.begin(), called.end());
  });
}
