-- Deletes an uploaded file.
-- KEYS[1] the file
-- ARGV: 1 prefix, 2 tenant, 3 file id
-- Returns 1, or 0 if there is no such file.

local size = redis.call('HGET', KEYS[1], 'bytes')
if not size then return 0 end
redis.call('UNLINK', KEYS[1])
if redis.call('ZREM', files_key(ARGV[2]), ARGV[3] .. ':' .. size) == 1 then
  redis.call('DECRBY', file_bytes_key(ARGV[2]), size)
end
return 1
