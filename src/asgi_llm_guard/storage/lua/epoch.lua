-- hello and accept: which epoch this namespace is in. A store that was flushed has none; one that was restored from an older
-- copy has one whose last heartbeat lies before what the client has seen.
--
-- ARGV: clock, `hello` or `accept`, an id for a new epoch, and for `accept` the id of the epoch whose data was lost.
-- Reply: clock, epoch. An epoch names the one before it, so that what one client has accepted all others do.
local epoch = call('GET', KEYS[1])
local before, wanted = ARGV[4] or '', nil
local beat = string.format('%.0f', now)
if not epoch then
  wanted = ARGV[3] .. ' ' .. beat .. ' ' .. before
elseif ARGV[2] == 'accept' then
  local id, seen = string.match(epoch, '^(%S+) (%d+) ')
  if id == before then
    wanted = ARGV[3] .. ' ' .. beat .. ' ' .. before
  else
    wanted = id .. ' ' .. seen .. ' ' .. before
  end
end
if wanted then
  epoch = wanted
  call('SET', KEYS[1], epoch, 'PX', KEEP)
end
return {now, epoch}
