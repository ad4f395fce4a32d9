// The emulated device seen from the host: streams whose work is deferred, events, the last error,
// and failures on request. The stand-ins for the CUDA runtime, cuBLASLt and NCCL are built on it.
//
// Work put on a stream is a closure that runs when the host waits for the stream or for a later
// event of it, or when work of another stream that waits for such an event runs. So a host that
// forgets to wait reads old data. To ThreadSanitizer each stream is a thread of its own, ordered
// with the host and with other streams only by what CUDA orders.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace simt::device {

using Work = std::function<void()>;

// A null stream is the default stream, ordered with all streams that are not non-blocking.
void Enqueue(cudaStream_t stream, Work work);
// Runs what has been put on the stream; null: the default stream and all that it is ordered with.
void Synchronize(cudaStream_t stream);
void SynchronizeAll();

cudaStream_t CreateStream(bool blocking);
void DestroyStream(cudaStream_t stream);
bool StreamExists(cudaStream_t stream);

// A point in a stream.
class Event;
std::shared_ptr<Event> CreateEvent();
void Record(const std::shared_ptr<Event>& event, cudaStream_t stream);
// The stream's later work comes after the event as it is recorded now.
void StreamWait(cudaStream_t stream, const std::shared_ptr<Event>& event);
void Synchronize(const std::shared_ptr<Event>& event);
bool WasRecorded(const Event& event);
// When the device passed it, in nanoseconds; after Synchronize.
int64_t PassedAt(const Event& event);

// SALA_SIMT_FAIL is a comma list of KIND:N (the N-th such call fails) and launch:KERNEL. Kinds:
// malloc, host_malloc, memcpy, sync, matmul, nccl.
bool FailsNow(const std::string& kind);
cudaError_t LaunchFailure(const std::string& kernel);
// Replaces SALA_SIMT_FAIL and starts counting again.
void SetFailures(const std::string& list);

// Keeps the error for cudaGetLastError and returns it. A sticky one is returned by every later
// call, as after an illegal address on a device.
cudaError_t Fail(cudaError_t error, bool sticky = false);
cudaError_t StickyError();
cudaError_t LastError(bool clear);

}  // namespace simt::device
