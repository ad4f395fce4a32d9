#include "data/byte_source.h"

#include <fcntl.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>
#include <zstd_errors.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <vector>

#include "core/check.h"
#include "core/file.h"

namespace sala::data {
namespace {

constexpr size_t kBufferBytes = size_t{256} << 10;

class PlainFile {
 public:
  explicit PlainFile(std::string path) : path_(std::move(path)) {}
  PlainFile(const PlainFile&) = delete;
  PlainFile& operator=(const PlainFile&) = delete;
  ~PlainFile() {
    if (fd_ >= 0) ::close(fd_);
  }

  Status Open() {
    SALA_RETURN_IF_ERROR(FileSize(path_).status());  // says what is missing or a directory
    fd_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
    return fd_ < 0 ? Broken("cannot open") : OkStatus();
  }
  Status Seek(int64_t offset) {
    if (::lseek(fd_, offset, SEEK_SET) != offset) return Broken("cannot seek");
    return OkStatus();
  }
  StatusOr<size_t> Read(char* to, size_t room) {
    while (true) {
      const ssize_t n = ::read(fd_, to, room);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) return Broken("reading broke off");
      read_ += n;
      return static_cast<size_t>(n);
    }
  }
  int64_t bytes_read() const { return read_; }
  const std::string& path() const { return path_; }

 private:
  Status Broken(const std::string& what) const {
    return MakeError(ExitCode::kIo, "FILE-READ",
                     path_ + ": " + what + " at byte " + std::to_string(read_) + ": " +
                         std::generic_category().message(errno));
  }
  std::string path_;
  int fd_ = -1;
  int64_t read_ = 0;
};

class PlainSource : public ByteSource {
 public:
  explicit PlainSource(std::string path) : file_(std::move(path)) {}
  Status Start(int64_t begin) {
    SALA_RETURN_IF_ERROR(file_.Open());
    return begin > 0 ? file_.Seek(begin) : OkStatus();
  }
  StatusOr<size_t> Read(char* to, size_t room) override { return file_.Read(to, room); }
  int64_t file_bytes_read() const override { return file_.bytes_read(); }

 private:
  PlainFile file_;
};

// What the two archives share: the buffer of packed bytes and the words of their errors.
class PackedSource : public ByteSource {
 public:
  PackedSource(std::string path, const char* kind)
      : file_(std::move(path)), kind_(kind), buffer_(kBufferBytes) {}
  int64_t file_bytes_read() const override { return file_.bytes_read(); }

 protected:
  Status Open() { return file_.Open(); }
  // Refills the empty buffer; at_end() when there is nothing more.
  Status Fill() {
    SALA_ASSIGN_OR_RETURN(size_, file_.Read(buffer_.data(), buffer_.size()));
    next_ = 0;
    end_ = size_ == 0;
    return OkStatus();
  }
  bool empty() const { return next_ == size_; }
  bool at_end() const { return end_; }
  const char* next() const { return buffer_.data() + next_; }
  size_t left() const { return size_ - next_; }
  void Take(size_t bytes) { next_ += bytes; }
  void Gave(size_t bytes) { text_ += static_cast<int64_t>(bytes); }

  Status Truncated() const {
    return MakeError(ExitCode::kData, "ING-TRUNCATED",
                     file_.path() + ": the " + kind_ +
                         (file_.bytes_read() == 0 ? " archive is empty" : " archive stops") +
                         " before its end" + Where() + "; copy the file again");
  }
  Status Damaged(const std::string& what) const {
    return MakeError(ExitCode::kData, "ING-CRC",
                     file_.path() + ": the " + kind_ + " archive is damaged: " + Printable(what) +
                         Where() + "; copy the file again");
  }
  Status NotRead(const std::string& what) const {
    return MakeError(ExitCode::kData, "ING-FORMAT", file_.path() + ": " + what + Where());
  }

 private:
  std::string Where() const {
    return " (byte " + std::to_string(file_.bytes_read() - static_cast<int64_t>(left())) +
           " of the file, byte " + std::to_string(text_) + " of its text)";
  }
  PlainFile file_;
  std::string kind_;
  std::vector<char> buffer_;
  size_t next_ = 0, size_ = 0;
  bool end_ = false;
  int64_t text_ = 0;
};

// Not zlib's gzread: that passes a file without the magic on as it is and drops what stands behind
// a member when it is no member, which makes a flipped byte the silent end of the text.
class GzipSource : public PackedSource {
 public:
  explicit GzipSource(std::string path) : PackedSource(std::move(path), "gzip") {}
  ~GzipSource() override { inflateEnd(&stream_); }

  Status Start() {
    constexpr int kGzipOnly = 15 + 16;  // the largest window, the gzip frame
    SALA_CHECK(inflateInit2(&stream_, kGzipOnly) == Z_OK) << "zlib cannot start";
    return Open();
  }

  StatusOr<size_t> Read(char* to, size_t room) override {
    while (true) {
      if (empty()) SALA_RETURN_IF_ERROR(Fill());
      if (at_end()) {
        if (in_member_ || file_bytes_read() == 0) return Truncated();
        return size_t{0};
      }
      if (!in_member_) inflateReset(&stream_);
      in_member_ = true;
      // zlib's interface lacks the const; it reads only.
      stream_.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(next()));
      stream_.avail_in = static_cast<uInt>(left());
      const size_t most = std::min(room, size_t{1} << 30);  // zlib counts in 32 bits
      stream_.next_out = reinterpret_cast<Bytef*>(to);
      stream_.avail_out = static_cast<uInt>(most);
      const int result = inflate(&stream_, Z_NO_FLUSH);
      Take(left() - stream_.avail_in);
      const size_t made = most - stream_.avail_out;
      Gave(made);
      if (result == Z_STREAM_END) {
        in_member_ = false;
      } else if (result != Z_OK) {
        return Damaged(stream_.msg != nullptr ? stream_.msg : "no gzip data");
      }
      if (made > 0) return made;
    }
  }

 private:
  z_stream stream_{};
  bool in_member_ = false;
};

class ZstdSource : public PackedSource {
 public:
  explicit ZstdSource(std::string path)
      : PackedSource(std::move(path), "zstd"), stream_(ZSTD_createDStream()) {}
  ~ZstdSource() override { ZSTD_freeDStream(stream_); }

  Status Start(int window_log) {
    SALA_CHECK(stream_ != nullptr) << "zstd cannot start";
    const size_t set = ZSTD_DCtx_setParameter(stream_, ZSTD_d_windowLogMax, window_log);
    SALA_CHECK(ZSTD_isError(set) == 0) << "zstd window 2^" << window_log;
    return Open();
  }

  StatusOr<size_t> Read(char* to, size_t room) override {
    while (true) {
      if (empty() && !at_end()) SALA_RETURN_IF_ERROR(Fill());
      if (at_end() && !in_frame_) {
        if (file_bytes_read() == 0) return Truncated();
        return size_t{0};
      }
      ZSTD_inBuffer in{next(), left(), 0};
      ZSTD_outBuffer out{to, room, 0};
      const size_t result = ZSTD_decompressStream(stream_, &out, &in);
      Take(in.pos);
      Gave(out.pos);
      if (ZSTD_isError(result) != 0) return Failure(result);
      in_frame_ = result != 0;
      if (out.pos > 0) return out.pos;
      if (at_end() && in_frame_) return Truncated();
    }
  }

 private:
  Status Failure(size_t result) const {
    if (ZSTD_getErrorCode(result) == ZSTD_error_frameParameter_windowTooLarge) {
      return NotRead(
          "the zstd archive was made with a longer window than is allowed for; "
          "give --zstd-long 31 (needs up to 2 GiB for each such file)");
    }
    return Damaged(ZSTD_getErrorName(result));
  }
  ZSTD_DStream* stream_;
  bool in_frame_ = false;
};

Status Skip(ByteSource& source, const std::string& path, int64_t bytes) {
  std::vector<char> dropped(kBufferBytes);
  while (bytes > 0) {
    SALA_ASSIGN_OR_RETURN(
        const size_t n,
        source.Read(dropped.data(), std::min(dropped.size(), static_cast<size_t>(bytes))));
    if (n == 0) {
      return MakeError(ExitCode::kData, "ING-TRUNCATED",
                       path + ": the text ends " + std::to_string(bytes) +
                           " bytes before the place where reading is to go on; the file was "
                           "changed, ingest again");
    }
    bytes -= static_cast<int64_t>(n);
  }
  return OkStatus();
}

}  // namespace

StatusOr<std::unique_ptr<ByteSource>> OpenByteSource(const std::string& path, Archive archive,
                                                     int64_t begin, int zstd_window_log) {
  if (archive == Archive::kNone) {
    auto source = std::make_unique<PlainSource>(path);
    SALA_RETURN_IF_ERROR(source->Start(begin));
    return source;
  }
  std::unique_ptr<ByteSource> source;
  if (archive == Archive::kGzip) {
    auto gzip = std::make_unique<GzipSource>(path);
    SALA_RETURN_IF_ERROR(gzip->Start());
    source = std::move(gzip);
  } else {
    auto zstd = std::make_unique<ZstdSource>(path);
    SALA_RETURN_IF_ERROR(zstd->Start(zstd_window_log));
    source = std::move(zstd);
  }
  SALA_RETURN_IF_ERROR(Skip(*source, path, begin));
  return source;
}

}  // namespace sala::data
