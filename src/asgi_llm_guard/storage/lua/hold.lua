-- hold: what a call id has, opened and ended, for exports.
--
-- ARGV: clock, all shapes the client knows, call ids.
-- Reply: for each its state, until when, and the hold's fields (see `reserve`), or nil; 'shape': that of a hold is not known.
learn_shapes(ARGV[2])
local replies = {}
for r = 3, #ARGV do
  local value = call('GET', HOLD .. ARGV[r])
  local reply = false
  if value then
    local h = cmsgpack.unpack(value)
    local state, till = h[1], h[2]
    reply = {state, state == 'O' and 0 or till}
    if state == 'E' then h = cmsgpack.unpack(h[3]) end
    if state ~= 'S' and state ~= 'C' then
      local flat = {h[6], h[3], owner_of(h, ARGV[r]), h[4], h[5] or ''}
      local shape = shape_of(h[6])
      if not shape then return 'shape' end
      for i, c in ipairs(claims_of(h, h[3], shape, 7)) do
        flat[5 + i] = {c.suffix, c.member or '', c.subject or '', c.amount, c.limit, c.taken, c.used, c.held, c.pin, c.resets or -1}
      end
      reply[3] = flat
    end
  end
  replies[r - 2] = reply
end
return replies
