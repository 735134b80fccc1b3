-- Stores an uploaded file, if its tenant has room for it.
-- KEYS[1] the index of the tenant's files
-- ARGV: 1 prefix, 2 tenant, 3 random end of the id, 4 the content, 5 its time to live in ms, 6 most bytes of the tenant,
--       7 most files of the tenant, 8.. fields and values of the record
-- Returns {id, created ms}, or without any change: 'too_many_bytes' | 'too_many_files'.

local tenant, ttl_ms, now = ARGV[2], tonumber(ARGV[5]), now_ms()
local total = file_bytes_key(tenant)

for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', int(now))) do -- Redis has dropped these files
  redis.call('ZREM', KEYS[1], member)
  redis.call('DECRBY', total, string.match(member, '%d+$'))
end
local files = redis.call('ZCARD', KEYS[1])
if files == 0 then redis.call('DEL', total) end
local size = string.len(ARGV[4])
if tonumber(redis.call('GET', total) or '0') + size > tonumber(ARGV[6]) then return 'too_many_bytes' end
if files >= tonumber(ARGV[7]) then return 'too_many_files' end

local id = 'file-' .. string.format('%011x', now) .. ARGV[3] -- ids order as the files were created
local key = file_key(tenant .. ':' .. id)
redis.call('HSET', key, 'content', ARGV[4], 'bytes', int(size), 'created_ms', int(now), 'expires_ms',
           int(now + ttl_ms), unpack(ARGV, 8))
redis.call('PEXPIRE', key, int(ttl_ms))
redis.call('ZADD', KEYS[1], int(now + ttl_ms), id .. ':' .. int(size))
redis.call('INCRBY', total, int(size))
local longest_ms = int(math.max(ttl_ms, redis.call('PTTL', total)))
redis.call('PEXPIRE', KEYS[1], longest_ms)
redis.call('PEXPIRE', total, longest_ms)
return {id, int(now)}
